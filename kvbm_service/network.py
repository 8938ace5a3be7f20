"""How a process of ours reaches the others: a bus and a directory, opened from the settings."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from kvbm_schemas.subjects import COMMAND_INBOX, node_inbox
from kvbm_service.adapters.bus import Bus
from kvbm_service.adapters.directory import Directory
from kvbm_service.errors import BusUnavailable
from kvbm_service.settings import Settings

if TYPE_CHECKING:
    from kvbm_service.adapters.etcd_login import EtcdLogin
    from kvbm_service.adapters.nats_bus import NatsBus

_log = logging.getLogger(__name__)

REFUSED_RETRY_SECONDS = 5.0
"""How long to leave a server alone that refused us: only an operator can change its mind."""


T = TypeVar("T")


class Network(NamedTuple):
    """Both ends of what connects the nodes."""

    bus: Bus
    directory: Directory

    async def close(self) -> None:
        """Leave the directory, and let go of all connections."""
        try:
            await self.directory.close()
        finally:
            await self.bus.close()


Connect = Callable[[], Awaitable[Network]]
"""Opens a network. Returns soon, connected or not: the adapters keep trying."""


def over_nats(settings: Settings, name: str, node: str = "") -> Connect:
    """The network of a deployment. `name` is what the NATS server lists this client as.

    `node`: whose leader or worker it is. Its answers then come where no other node can listen.

    Raises:
        SettingError: how to reach the directory cannot be understood.
    """
    inbox = node_inbox(settings.namespace, node) if node else COMMAND_INBOX
    check_directory(settings)

    async def connect() -> Network:
        bus = await _until_admitted(lambda: connect_bus(settings, name, inbox))
        try:
            directory = await _until_admitted(lambda: connect_directory(settings, bus, name, inbox))
        except BaseException:
            await bus.close()
            raise
        return Network(bus, directory)

    return connect


async def connect_bus(settings: Settings, name: str, inbox: str, url: str = "") -> NatsBus:
    """A bus on NATS, at `KVBM_NATS_URL` if no `url` is given; there or not.

    Raises:
        BusUnavailable: a server is there and refuses us.
    """
    # Adapters are imported when wanted: an engine's worker that never connects need not.
    from kvbm_service.adapters.nats_bus import NatsBus
    from kvbm_service.adapters.nats_login import TlsFiles

    return await NatsBus.connect(
        url or settings.nats_url,
        settings.nats_credentials,
        name,
        tls=TlsFiles(settings.nats_ca, settings.nats_certificate, settings.nats_key),
        inbox=inbox,
    )


async def connect_directory(
    settings: Settings, bus: NatsBus, name: str, inbox: str, *, leaders_only: bool = False
) -> Directory:
    """The directory that `KVBM_DIRECTORY_URL` names, there or not: etcd, or a NATS server.

    `bus` is used where it leads there, too. `leaders_only`: ranks need not be reported.

    Raises:
        BusUnavailable: a NATS server is there and refuses us.
    """
    if _on_etcd(settings):
        from kvbm_service.adapters.etcd_directory import EtcdDirectory

        return EtcdDirectory(_etcd_login(settings), settings.membership_seconds)

    from kvbm_service.adapters.nats_directory import NatsDirectory

    elsewhere = settings.directory_url not in ("", settings.nats_url)
    if elsewhere:
        bus = await connect_bus(settings, f"{name} (directory)", inbox, settings.directory_url)
    return NatsDirectory(
        bus,
        lease_seconds=settings.membership_seconds,
        leaders_only=leaders_only,
        own_bus=elsewhere,
    )


def check_directory(settings: Settings) -> None:
    """Refuse at start what can be known to be wrong by then.

    Raises:
        SettingError: a URL, a certificate or a key will not do.
    """
    if _on_etcd(settings):
        _etcd_login(settings)


def _on_etcd(settings: Settings) -> bool:
    return settings.directory_url.startswith(("etcd://", "etcds://"))


def _etcd_login(settings: Settings) -> EtcdLogin:
    from kvbm_service.adapters.etcd_login import parse_login

    return parse_login(
        settings.directory_url, settings.etcd_ca, settings.etcd_certificate, settings.etcd_key
    )


async def _until_admitted(connect: Callable[[], Awaitable[T]]) -> T:
    """Connect; where the server refuses us, say so once and try again from time to time."""
    said = ""
    while True:
        try:
            return await connect()
        except BusUnavailable as error:
            if str(error) != said:
                said = str(error)
                _log.error("%s; this node goes on by itself meanwhile", said)
        await asyncio.sleep(REFUSED_RETRY_SECONDS)
