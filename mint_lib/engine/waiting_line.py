"""The waiting line: requests that were accepted and not begun, fair between tenants.

Goes in: requests with their tenants. Comes out: the next one, tenants in turn; refusals when the line is full, with an
estimate of when it will not be. It knows nothing of what the requests ask for. Its caller holds a lock.
"""

import collections
import dataclasses
from collections.abc import Callable

from mint_lib.engine.requests import EngineLimits, Event, GenerateRequest, RankRequest
from mint_lib.errors import Overloaded

_NUM_RECENT = 32
_LONGEST_RETRY_SECONDS = 60.0


@dataclasses.dataclass(eq=False, kw_only=True)
class Entry:
    """One request on its way."""

    request: RankRequest | GenerateRequest
    deliver: Callable[[Event], None]
    queued_at: float
    is_cancelled: bool = False


class WaitingLine:
    """First come, first served within a tenant; tenants take turns."""

    def __init__(self, limits: EngineLimits):
        self._limits = limits
        # The tenant whose turn it is stands first.
        self._entries: collections.OrderedDict[str, collections.deque[Entry]] = collections.OrderedDict()
        self._answered_at: collections.deque[float] = collections.deque(maxlen=_NUM_RECENT)

    def __len__(self) -> int:
        return sum(map(len, self._entries.values()))

    def add(self, entry: Entry) -> None:
        """Put `entry` at the end of its tenant's line.

        Raises:
            Overloaded: the whole line is full, or the tenant's share of it.
        """
        tenant = entry.request.tenant
        num_queued, num_own = len(self), len(self._entries.get(tenant, ()))
        if num_queued >= self._limits.max_queued:
            retry = self._estimate_retry(num_queued, entry.queued_at)
            raise Overloaded(f"All {num_queued} places of the queue are taken. Try again in {retry:.0f} s.", retry)
        if num_own >= self._limits.max_queued_per_tenant:
            retry = self._estimate_retry(num_own, entry.queued_at)
            raise Overloaded(
                f"You have {num_own} requests in the queue, which is your share of it. Wait for some, or try again in "
                f"{retry:.0f} s.",
                retry,
            )
        self._entries.setdefault(tenant, collections.deque()).append(entry)

    def peek(self) -> Entry | None:
        """The entry whose turn it is."""
        return next(iter(self._entries.values()))[0] if self._entries else None

    def take(self) -> Entry:
        """Take out the entry whose turn it is; its tenant goes to the end."""
        tenant, entries = next(iter(self._entries.items()))
        entry = entries.popleft()
        self._entries.move_to_end(tenant)
        self._forget_empty(tenant)
        return entry

    def discard(self, entry: Entry) -> None:
        """Take out `entry` if it waits here."""
        tenant = entry.request.tenant
        if entry in self._entries.get(tenant, ()):
            self._entries[tenant].remove(entry)
            self._forget_empty(tenant)

    def take_if(self, condition: Callable[[Entry], bool]) -> list[Entry]:
        """Take out every entry that meets `condition`."""
        taken = [entry for entries in self._entries.values() for entry in entries if condition(entry)]
        for entry in taken:
            self.discard(entry)
        return taken

    def note_answered(self, num_answered: int, at: float) -> None:
        """Requests of this line were answered; `at` is a time of the same clock as `Entry.queued_at`."""
        self._answered_at.extend([at] * num_answered)

    def _forget_empty(self, tenant: str) -> None:
        if not self._entries[tenant]:
            del self._entries[tenant]

    def _estimate_retry(self, num_ahead: int, at: float) -> float:
        """Seconds until `num_ahead` requests are answered at the recent rate, from 1 to 60."""
        recent = [answered_at for answered_at in self._answered_at if at - answered_at <= _LONGEST_RETRY_SECONDS]
        if len(recent) < 2:
            return 1.0
        return min(max(num_ahead * (at - recent[0]) / len(recent), 1.0), _LONGEST_RETRY_SECONDS)
