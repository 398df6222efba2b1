"""The engines of a server: one for each base, shared by the students of that base.

Goes in: how to load a base. Comes out: a running engine, kept for as long as somebody uses it. It knows neither the
store nor what an adapter is trained for.
"""

import contextlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from mint_lib.engine.requests import EngineLimits, EngineObserver
from mint_lib.errors import Draining
from mint_lib.server.students import Precision, ServedStudent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mint_lib.engine.scheduler import Engine
    from mint_lib.reading import Reader
    from mint_lib.server.safe_base import BaseFacts

logger = logging.getLogger(__name__)


class BaseKey(NamedTuple):
    """What an engine is shared by."""

    digest: str
    """Of the base, as students name it, or of an image student's version; whoever loads it proves it."""
    precision: Precision


class LoadedModel(NamedTuple):
    """A base, or a whole student, before it has an engine."""

    model: "PreTrainedModel"
    reader: "Reader"
    facts: "BaseFacts"


class RunningBase(NamedTuple):
    """A base that answers."""

    key: BaseKey
    engine: "Engine"
    reader: "Reader"
    facts: "BaseFacts"


class Engines:
    """All methods may be called from any thread."""

    def __init__(self, *, limits: EngineLimits, observer: EngineObserver):
        self._limits = limits
        self._observer = observer
        self._lock = threading.Lock()
        self._loading: dict[BaseKey, threading.Lock] = {}
        self._bases: dict[BaseKey, RunningBase] = {}
        self._num_users: dict[BaseKey, int] = {}
        self._is_stopped = False
        self._retiring = ThreadPoolExecutor(1, thread_name_prefix="retire")

    def has(self, key: BaseKey) -> bool:
        """Whether the base runs, so that nothing of it must be fetched."""
        with self._lock:
            return key in self._bases

    def hold(self, key: BaseKey, load: Callable[[], LoadedModel]) -> RunningBase:
        """The running base `key`, from `load` if nobody holds it. It runs until as many have called `let_go`.

        Raises:
            Draining: `stop` was called.
        """
        with self._lock:
            loading = self._loading.setdefault(key, threading.Lock())
        with loading:
            with self._lock:
                self._check_running()
                if key in self._bases:
                    self._num_users[key] += 1
                    return self._bases[key]
            return self._start(key, load())

    def _start(self, key: BaseKey, loaded: LoadedModel) -> RunningBase:
        from mint_lib.engine.scheduler import Engine

        collate_images = loaded.reader.collate_images
        engine = Engine(loaded.model, limits=self._limits, observer=self._observer, collate_images=collate_images)
        base = RunningBase(key, engine, loaded.reader, loaded.facts)
        with self._lock:
            self._check_running()
            engine.start()
            self._bases[key] = base
            self._num_users[key] = 1
        return base

    def let_go(self, key: BaseKey) -> None:
        """Say that one of those who called `hold` is done; the last one stops the engine and frees its memory."""
        with self._lock:
            if key not in self._num_users:  # everything was stopped meanwhile
                return
            self._num_users[key] -= 1
            if self._num_users[key]:
                return
            base = self._bases.pop(key)
            del self._num_users[key]
        base.engine.stop()
        logger.info("the engine of base %s in %s stopped", *key)

    def retire(self, student: ServedStudent) -> None:
        """Free a student that no request uses any more, in a thread: the caller may be the last request's own."""
        self._retiring.submit(self.remove, student)

    def remove(self, student: ServedStudent) -> None:
        """Free a student and, if it was the last one on its base, the engine."""
        with self._lock:
            key = next((key for key, base in self._bases.items() if base.engine is student.engine), None)
        if key is None:
            return
        self.drop(key, student.adapter, student.engine)

    def drop(self, key: BaseKey, adapter: str, engine: "Engine") -> None:
        """Free an adapter on the base `key`, and let go of the base."""
        # A stopped engine holds no adapter any more.
        with contextlib.suppress(Draining):
            engine.remove_adapter(adapter)
        self.let_go(key)

    def engines(self) -> list["Engine"]:
        """The engines that run at this moment."""
        with self._lock:
            return [base.engine for base in self._bases.values()]

    def stop(self) -> None:
        """Stop every engine. What has not finished by then fails; pause admission and wait before."""
        with self._lock:
            self._is_stopped = True
        # Removals first, as they need a running engine.
        self._retiring.shutdown()
        with self._lock:
            bases = list(self._bases.values())
            self._bases.clear()
            self._num_users.clear()
        for base in bases:
            base.engine.stop()

    def _check_running(self) -> None:
        if self._is_stopped:
            raise Draining("The server is shutting down and loads no more students. Ask another replica.")
