"""Follows an alias: when `champion` moves, the new version is loaded beside the old one and takes its name.

Goes in: an alias, a lineup, and how a reference is loaded. Comes out: nothing but swaps. A version that cannot be
loaded leaves the old one serving and is not tried again until the alias moves; a store that does not answer leaves
everything as it is.
"""

import enum
import logging
import random
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from mint_lib.errors import AccessDenied, DeadlineExceeded, MintError, Overloaded, StoreUnreachable
from mint_lib.records import Reference
from mint_lib.server.students import Lineup, ServedStudent

if TYPE_CHECKING:
    from mint_lib.store import Store

logger = logging.getLogger(__name__)
MAX_PAUSE_SECONDS = 300.0
_STOP_SECONDS = 1.0
_CAN_PASS = (StoreUnreachable, AccessDenied, Overloaded, DeadlineExceeded)
"""Says nothing about the version itself. A warm answer may have to wait on an engine that clients keep busy."""


class Outcome(enum.StrEnum):
    """What came of one look at the alias."""

    UNCHANGED = "unchanged"
    SWAPPED = "swapped"
    REFUSED = "refused"
    """The version cannot be served; the old one stays."""
    POSTPONED = "postponed"
    """The store gave no answer, or the server is too busy to load; looked at again later."""


class Follower:
    """Watches one alias for one name, from a thread of its own."""

    def __init__(
        self,
        store: "Store",
        lineup: Lineup,
        *,
        name: str,
        alias: str,
        load: Callable[[str], ServedStudent],
        retire: Callable[[ServedStudent], None],
        interval_seconds: float,
        tell: Callable[[str, Outcome], None],
    ):
        """`alias` is, for instance, `model/quickstart@champion`, and `name` what requests call the student.

        `load` gives the student of a full reference; `retire` frees the replaced one when no request uses it any more.
        `tell` is called with the name after every look, from the follower's thread.
        """
        self._store, self._lineup = store, lineup
        self._name, self._alias = name, alias
        self._load, self._retire, self._tell = load, retire, tell
        self._interval_seconds = interval_seconds
        self._refused: Reference | None = None
        self._num_postponed = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"follow-{name}", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer. A load under way is finished in the background, and its student is freed, not served."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_SECONDS)

    def look(self) -> Outcome:
        """Look at the alias once and follow it if it moved."""
        try:
            wanted = self._store.resolve(self._alias)
        except MintError as error:
            logger.warning("%s cannot be read, and %s goes on as it is: %s", self._alias, self._name, error)
            return Outcome.POSTPONED
        serving = next((student.reference for student in self._lineup.students() if student.name == self._name), None)
        if wanted == serving:
            self._refused = None
        if wanted in (serving, self._refused):
            return Outcome.UNCHANGED
        try:
            student = self._load(str(wanted))
        except _CAN_PASS as error:
            logger.warning("%s could not be loaded yet: %s", wanted, error)
            return Outcome.POSTPONED
        except Exception:  # whatever is wrong with a new version, the old one must go on serving
            self._refused = wanted
            logger.exception("%s is refused, and %s goes on with %s", wanted, self._name, serving or "nothing")
            return Outcome.REFUSED
        if self._stopped.is_set():
            self._retire(student)
            return Outcome.UNCHANGED
        self._refused = None
        self._lineup.put(student, retire=self._retire)
        logger.info("%s answers with %s in place of %s", self._name, wanted, serving or "nothing")
        return Outcome.SWAPPED

    def _run(self) -> None:
        while not self._stopped.wait(self._pause_seconds()):
            outcome = self.look()
            self._num_postponed = self._num_postponed + 1 if outcome is Outcome.POSTPONED else 0
            self._tell(self._name, outcome)

    def _pause_seconds(self) -> float:
        """The interval; longer while the store does not answer, and never the same for all replicas."""
        backed_off = min(self._interval_seconds * 2 ** min(self._num_postponed, 16), MAX_PAUSE_SECONDS)
        return max(self._interval_seconds, backed_off) * random.uniform(0.9, 1.1)
