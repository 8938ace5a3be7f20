"""What a leader's parts leave for the outside: effects to carry out, and facts to count."""

from __future__ import annotations

from kvbm_service.core.accounts import Account, Path, Transferred
from kvbm_service.core.effects import Effect

MAX_ACCOUNTS = 65_536
"""Facts that nobody has fetched. Beyond, the oldest are dropped."""


class Outbox:
    """Effects and accounts, in order, until someone takes them."""

    def __init__(self, block_bytes: int) -> None:
        self.effects: list[Effect] = []
        self.block_bytes = block_bytes
        """Bytes of one block over all ranks."""
        self._accounts: list[Account] = []

    def tell(self, *accounts: Account) -> None:
        """This has happened."""
        self._accounts.extend(accounts)
        if len(self._accounts) > MAX_ACCOUNTS:
            del self._accounts[: MAX_ACCOUNTS // 2]

    def transferred(self, path: Path, good: int, bad: int, reason: str, seconds: float) -> None:
        """Blocks have gone a way, and others have not."""
        why = (reason or "unknown") if bad else ""
        self.tell(Transferred(path, good, good * self.block_bytes, bad, why, seconds))

    def take_effects(self) -> list[Effect]:
        """What is to be done, and forget it."""
        effects, self.effects[:] = list(self.effects), []
        return effects

    def take_accounts(self) -> list[Account]:
        """What has happened since the last call."""
        accounts, self._accounts = self._accounts, []
        return accounts
