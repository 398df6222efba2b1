"""The engine: one thread that answers many requests with one model, a step at a time.

Goes in: requests of token ids, and adapters. Comes out: events, delivered from the engine's thread. A step takes what
was asked of the engine, begins requests, and computes in one forward pass a token of every running answer together with
up to `step_tokens` tokens of prompts and labels. It knows no HTTP, no text and no store.
"""

import concurrent.futures
import logging
import pathlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from mint_lib.engine.adapters import Adapters
from mint_lib.engine.batch import LATE, Batch
from mint_lib.engine.forward import ForwardPass
from mint_lib.engine.image_features import ImageFeatures, is_batched, sees_images
from mint_lib.engine.one_by_one import CollateImages, OneByOne
from mint_lib.engine.prefix_cache import PrefixCache
from mint_lib.engine.prompt_images import PromptImages
from mint_lib.engine.requests import EngineLimits, EngineObserver, Event, GenerateRequest, RankRequest
from mint_lib.engine.waiting_line import Entry, WaitingLine
from mint_lib.errors import ComputationFailed, DeadlineExceeded, Draining, InvalidInput, MintError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
_MIB = 2**20
_STOPPED = "The engine was stopped. Build another one."
_SHUTTING_DOWN = "The server is shutting down. Send the request again; another one will answer."


class Ticket:
    """What a client holds of a request that was accepted."""

    def __init__(self, cancel: Callable[[], None]):
        self._cancel = cancel

    def cancel(self) -> None:
        """Stop working on the request at the next step. No event follows but one that is being delivered."""
        self._cancel()


class Engine:
    """Answers requests with one model. Public methods may be called from any thread but the engine's own."""

    def __init__(
        self,
        model: "PreTrainedModel",
        *,
        limits: EngineLimits,
        observer: EngineObserver,
        seed: int = 0,
        collate_images: CollateImages | None = None,
    ):
        """Prepare `model`: a base without adapter, in evaluation mode, on its device, quantised if it is to be.

        `collate_images` is the reader's, for an image student of a family that is served one request at a time.

        Raises:
            InvalidInput: the model's layers are of a kind that the engine does not serve.
        """
        self._observer = observer
        self._num_tokens_known = model.get_input_embeddings().num_embeddings
        self._sees_images = sees_images(model)
        self._prefixes = PrefixCache(limits.prefix_cache_mib * _MIB)
        self._batch: Batch | OneByOne
        if self._sees_images and not is_batched(model) and collate_images is not None:
            self._adapters = Adapters(model, None)
            self._batch = OneByOne(
                model,
                collate_images=collate_images,
                limits=limits,
                observer=observer,
                is_stopping=lambda: self._is_stopping,
                seed=seed,
            )
        else:
            see = ImageFeatures(model).compute if self._sees_images else _refuse_images
            forward_pass = ForwardPass(model)
            self._adapters = Adapters(model, forward_pass)
            self._batch = Batch(
                forward_pass=forward_pass,
                adapters=self._adapters,
                prefixes=self._prefixes,
                limits=limits,
                observer=observer,
                see=see,
                seed=seed,
            )
        # Its lock, which its holder may take again, guards the line, the names of adapters, commands and switches.
        # The batch and the prefixes belong to the engine's thread.
        self._changed = threading.Condition()
        self._line = WaitingLine(limits)
        self._commands: list[tuple[Callable[[], None], concurrent.futures.Future[None]]] = []
        self._is_admitting = True
        self._is_stopping = False
        self._thread: threading.Thread | None = None
        self._told_queue = (0, 0)
        self._told_bytes = 0

    @property
    def num_queued(self) -> int:
        """Requests that wait."""
        with self._changed:
            return len(self._line)

    @property
    def num_running(self) -> int:
        """Requests that are being computed."""
        return len(self._batch)

    def start(self) -> None:
        """Begin to compute."""
        assert self._thread is None, "an engine starts once"
        self._thread = threading.Thread(target=self._work, name="mint-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the engine's thread; every request that has no answer yet fails with `Draining`."""
        with self._changed:
            self._is_admitting = False
            self._is_stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        else:
            self._close()

    def pause_admission(self) -> None:
        """Refuse new requests with `Draining`; accepted ones are answered."""
        with self._changed:
            self._is_admitting = False

    def add_adapter(self, key: str, folder: pathlib.Path | None) -> None:
        """Load the PEFT adapter of `folder` under `key` between two steps; None: the base itself. Returns when done.

        Raises:
            InvalidInput: the key is taken, or the folder holds no plain LoRA adapter for this base.
            Draining: the engine was stopped.
        """
        self._command(lambda: self._adapters.add(key, folder))

    def remove_adapter(self, key: str) -> None:
        """Free the adapter of `key` and its prefixes. Requests that still use it fail with `Draining`.

        Raises:
            Draining: the engine was stopped.
        """
        self._command(lambda: self._remove_adapter(key))

    def submit(self, request: RankRequest | GenerateRequest, deliver: Callable[[Event], None]) -> Ticket:
        """Accept `request`; its events are given to `deliver`, from the engine's thread. Never blocks on computation.

        Raises:
            InvalidInput: the request cannot be computed.
            Overloaded: the queue, or the tenant's share of it, is full.
            Draining: no new requests are taken.
        """
        self._check(request)
        entry = Entry(request=request, deliver=deliver, queued_at=time.monotonic())
        with self._changed:
            if not self._is_admitting:
                raise Draining(_SHUTTING_DOWN)
            if request.adapter not in self._adapters.names:
                raise InvalidInput(f"No adapter is loaded as {request.adapter}. Add it first.")
            self._line.add(entry)
            self._changed.notify_all()
        return Ticket(lambda: self._cancel(entry))

    def _check(self, request: RankRequest | GenerateRequest) -> None:
        if not request.prompt_ids:
            raise InvalidInput("The prompt has no token. Give at least one.")
        # An id beyond the embedding would break the pass, and on a GPU the whole process.
        if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= self._num_tokens_known:
            raise InvalidInput(f"Token ids must be from 0 to {self._num_tokens_known - 1}.")
        if request.images is not None and not self._sees_images:
            _refuse_images(request.images)
        if isinstance(request, GenerateRequest) and request.max_new_tokens < 1:
            raise InvalidInput(f"max_new_tokens is {request.max_new_tokens}; give 1 or more.")

    def _cancel(self, entry: Entry) -> None:
        with self._changed:
            entry.is_cancelled = True
            self._line.discard(entry)
            self._changed.notify_all()

    def _command(self, action: Callable[[], None]) -> None:
        """Run `action` in the engine's thread between steps, or here while there is none; raise what it raises."""
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        with self._changed:
            if self._is_stopping:
                raise Draining(_STOPPED)
            self._commands.append((action, done))
            if self._thread is None:
                self._run_commands()
            self._changed.notify_all()
        try:
            done.result()
        except concurrent.futures.CancelledError:
            raise Draining(_STOPPED) from None

    def _run_commands(self) -> None:
        with self._changed:
            commands, self._commands = self._commands, []
        for action, done in commands:
            try:
                done.set_result(action())
            except Exception as error:
                done.set_exception(error)

    def _remove_adapter(self, key: str) -> None:
        error = Draining("The model that this request began with was unloaded. Send the request again.")
        with self._changed:
            waiting = self._line.take_if(lambda entry: entry.request.adapter == key)
            name = self._adapters.remove(key)
        self._fail([*waiting, *self._batch.entries(adapter=key)], error)
        if name is not None:
            self._prefixes.drop_adapter(name)

    def _work(self) -> None:
        """The engine's thread."""
        while True:
            with self._changed:
                while not (self._is_stopping or self._commands or len(self._line) or len(self._batch)):
                    self._changed.wait()
                if self._is_stopping:
                    break
            self._run_commands()
            try:
                self._step()
            except Exception as error:
                # A mistake of ours must not leave requests without an answer, nor the server without its engine.
                logger.error("an engine step failed (%s); the running requests fail", type(error).__name__)
                self._fail(self._batch.entries(), ComputationFailed("The engine failed. Send the request again."))
        self._close()

    def _step(self) -> None:
        now = time.monotonic()
        with self._changed:
            late = self._line.take_if(lambda entry: entry.request.deadline < now)
        self._fail(late, DeadlineExceeded(LATE))
        num_answered = self._batch.step(self._take_next)
        with self._changed:
            self._line.note_answered(num_answered, time.monotonic())
        self._tell_observer()

    def _take_next(self, condition: Callable[[Entry], bool]) -> Entry | None:
        with self._changed:
            entry = self._line.peek()
            if entry is None or not condition(entry):
                return None
            return self._line.take()

    def _close(self) -> None:
        with self._changed:
            commands, self._commands = self._commands, []
            waiting = self._line.take_if(lambda _: True)
        self._fail([*waiting, *self._batch.entries()], Draining(_SHUTTING_DOWN))
        for _, done in commands:
            done.cancel()
        self._tell_observer()

    def _fail(self, entries: Sequence[Entry], error: MintError) -> None:
        for entry in entries:
            self._batch.fail(entry, error)

    def _tell_observer(self) -> None:
        queue = (self.num_queued, self.num_running)
        if queue != self._told_queue:
            self._told_queue = queue
            self._observer.see_queue(num_queued=queue[0], num_running=queue[1])
        num_evicted = self._prefixes.take_num_evicted()
        if num_evicted or self._prefixes.num_bytes != self._told_bytes:
            self._told_bytes = self._prefixes.num_bytes
            self._observer.see_prefix_cache(num_bytes=self._told_bytes, num_evicted_blocks=num_evicted)


def _refuse_images(_images: PromptImages) -> NoReturn:
    raise InvalidInput("The model reads text only. Leave the images out.")
