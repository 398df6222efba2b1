"""What calls cost, and the limit that they stop before.

Goes in: the most that a call can cost before it is made, and what it did cost. Comes out: the sum, or `GateFailed`
before a call that could exceed the limit. Calls under way count with the most that they can cost, so concurrent calls
may stop a little early and never late.
"""

import threading

from mint_lib.errors import GateFailed


class Budget:
    """A sum with a limit, for several threads."""

    def __init__(self, limit: float | None):
        self._limit = limit
        self._lock = threading.Lock()
        self._reserved = 0.0
        self.spent = 0.0
        """What was paid so far, in the currency of the prices."""

    def reserve(self, amount: float) -> None:
        """Set `amount` aside for a call.

        Raises:
            GateFailed: the limit could be exceeded.
        """
        with self._lock:
            if self._limit is not None and self.spent + self._reserved + amount > self._limit:
                raise GateFailed(
                    f"The budget max_cost of {self._limit:g} does not allow another call: {self.spent:.4g} is spent, "
                    f"{self._reserved:.4g} set aside for calls under way, and the next may cost up to {amount:.4g}. "
                    "Answers so far are kept: raise max_cost, and the same command asks only what is missing."
                )
            self._reserved += amount

    def settle(self, amount: float, *, cost: float) -> None:
        """Take back `amount` that was set aside; `cost` was paid."""
        with self._lock:
            self._reserved -= amount
            self.spent += cost
