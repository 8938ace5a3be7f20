"""The configuration in deploy/nats, on a real server, and logins to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvbm_service.adapters.nats_bus import NatsBus
from kvbm_service.adapters.nats_login import TlsFiles
from kvbm_service.settings import Settings
from tests.security.certificates import Authority
from tests.security.guarded_nats import GuardedNats, guarded_nats

CONFIGURATION = Path(__file__).parents[2] / "deploy" / "nats"
PASSWORDS = {
    user: f"pw-of-{user}"
    for user in ("operator", "registry", "observer", "router", "node-1", "node-2")
}


class Shipped:
    """A server that runs as we tell people to run it."""

    def __init__(self, server: GuardedNats, ca: Path) -> None:
        self.server = server
        self.ca = str(ca)

    def url(self, user: str) -> str:
        """Where, and as whom."""
        return self.server.url(f"{user}:{PASSWORDS[user]}", scheme="tls")

    def settings(self, user: str, **others: object) -> Settings:
        """What a process of this user is started with."""
        return Settings(nats_url=self.url(user), nats_ca=self.ca, **others)  # type: ignore[arg-type]

    def environ(self, user: str) -> dict[str, str]:
        """The same for a command."""
        return {"KVBM_NATS_URL": self.url(user), "KVBM_NATS_CA": self.ca}

    async def bus(self, user: str, inbox: str) -> NatsBus:
        """A connection of this user."""
        return await NatsBus.connect(self.url(user), tls=TlsFiles(ca=self.ca), inbox=inbox)


@contextmanager
def shipped_nats(folder: Path, configuration: Path = CONFIGURATION) -> Iterator[Shipped]:
    """The shipped server while the block lasts."""
    authority = Authority(folder)
    mine = authority.issue("server")
    environ = {
        "NATS_TLS_CERTIFICATE": str(mine.certificate),
        "NATS_TLS_KEY": str(mine.key),
        "NATS_TLS_CA": str(authority.ca),
        "NATS_STORE": str(folder / "store"),
    }
    for user, password in PASSWORDS.items():
        environ[f"NATS_{user.upper().replace('-', '_')}_PASSWORD"] = password
    with guarded_nats(folder, configuration / "kvbm.conf", environ) as server:
        yield Shipped(server, authority.ca)
