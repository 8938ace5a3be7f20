"""Which orders a rank has carried out: each once, by whatever way and how often it is told.

A fetch, or an order to lend, can come twice: by the bus, and again with the engine's next step
when the answer to the first was lost. The second must not touch what is in use for something
else by then.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from kvbm_schemas.step import Moved
from kvbm_service.core.columns import pack_u32

Tell = Callable[[Moved], None]

MAX_REMEMBERED = 4096
"""Orders whose outcome is remembered. An older one that comes again counts as failed."""


class Once:
    """Outcomes by op, and who waits for those that are not known yet. Safe to call from threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[int, list[Tell]] = {}
        """Whom to tell of those that are under way."""
        self._outcomes: OrderedDict[int, Moved] = OrderedDict()
        self._forgotten = 0
        """Ops up to this one may have been carried out and forgotten."""

    def begin(self, op: int, tell: Tell, blocks: int) -> bool:
        """Whether `op` is to be carried out now. Whenever its outcome is known, `tell` hears it.

        Of one too old to be remembered, `tell` hears that none of its `blocks` came: either the
        leader knows its outcome, and does not listen, or it was never begun.
        """
        with self._lock:
            if op in self._waiting:
                self._waiting[op].append(tell)
                return False
            outcome = self._outcomes.get(op)
            if outcome is None and op > self._forgotten:
                self._waiting[op] = [tell]
                return True
        tell(outcome or Moved(op=op, failed=pack_u32(range(blocks)), reason="too old"))
        return False

    def end(self, outcome: Moved) -> None:
        """It has been carried out."""
        with self._lock:
            waiting = self._waiting.pop(outcome.op)
            self._outcomes[outcome.op] = outcome
            if len(self._outcomes) > MAX_REMEMBERED:
                op, _ = self._outcomes.popitem(last=False)
                self._forgotten = max(self._forgotten, op)
        for tell in waiting:
            tell(outcome)
