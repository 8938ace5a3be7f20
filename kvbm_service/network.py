"""How a process of ours reaches the others: a bus and a directory, opened from the settings."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NamedTuple, TypeVar

from kvbm_schemas.subjects import COMMAND_INBOX, node_inbox
from kvbm_service.adapters.bus import Bus
from kvbm_service.adapters.directory import Directory
from kvbm_service.errors import BusUnavailable
from kvbm_service.settings import Settings

_log = logging.getLogger(__name__)

REFUSED_RETRY_SECONDS = 5.0
"""How long to leave a server alone that refused us: only an operator can change its mind."""


B = TypeVar("B", bound=Bus)


class Network(NamedTuple):
    """Both ends of what connects the nodes."""

    bus: Bus
    directory: Directory


Connect = Callable[[], Awaitable[Network]]
"""Opens a network. Returns soon, connected or not: the adapters keep trying."""


def over_nats(settings: Settings, name: str, node: str = "") -> Connect:
    """The network of a deployment. `name` is what the NATS server lists this client as.

    `node`: whose leader or worker it is. Its answers then come where no other node can listen.
    """

    async def connect() -> Network:
        # Imported here: an engine's worker that never connects need not load them.
        from kvbm_service.adapters.nats_bus import NatsBus
        from kvbm_service.adapters.nats_directory import NatsDirectory
        from kvbm_service.adapters.nats_login import TlsFiles

        inbox = node_inbox(settings.namespace, node) if node else COMMAND_INBOX
        bus = await _until_admitted(
            lambda: NatsBus.connect(
                settings.nats_url,
                settings.nats_credentials,
                name,
                tls=TlsFiles(settings.nats_ca, settings.nats_certificate, settings.nats_key),
                inbox=inbox,
            )
        )
        return Network(bus, NatsDirectory(bus, lease_seconds=settings.membership_seconds))

    return connect


async def _until_admitted(connect: Callable[[], Awaitable[B]]) -> B:
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
