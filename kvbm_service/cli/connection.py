"""Connections of a command: opened from the settings, closed when it ends."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from kvbm_schemas.subjects import COMMAND_INBOX, REGISTRY_INBOX
from kvbm_service.adapters.bus import Bus
from kvbm_service.adapters.directory import Directory
from kvbm_service.settings import Settings

if TYPE_CHECKING:
    from kvbm_service.adapters.nats_bus import NatsBus

_adapters_log = logging.getLogger("kvbm_service.adapters")


@asynccontextmanager
async def open_bus(settings: Settings) -> AsyncIterator[NatsBus]:
    """A bus that is connected: a command, unlike a service, does not wait for NATS to appear.

    Raises:
        BusUnavailable: NATS cannot be reached, or refuses us.
    """
    level = _adapters_log.level
    _adapters_log.setLevel(logging.ERROR)  # the error says it already, in one line
    bus = await _connect(settings, "kvbm command", COMMAND_INBOX)
    try:
        assert bus.client is not None  # raises, with the reason, when there is no connection
        _adapters_log.setLevel(level)
        yield bus
    finally:
        await bus.close()


@asynccontextmanager
async def open_directory(
    settings: Settings, bus: NatsBus, *, leaders_only: bool = False
) -> AsyncIterator[Directory]:
    """The directory of the cluster that `bus` belongs to."""
    from kvbm_service.adapters.nats_directory import NatsDirectory

    directory = NatsDirectory(
        bus, lease_seconds=settings.membership_seconds, leaders_only=leaders_only
    )
    try:
        yield directory
    finally:
        await directory.close()


@asynccontextmanager
async def open_network(settings: Settings, name: str) -> AsyncIterator[tuple[Bus, Directory]]:
    """A bus and a directory for a registry, which waits for NATS where it is not there yet.

    Raises:
        BusUnavailable: NATS refuses us.
    """
    bus = await _connect(settings, name, REGISTRY_INBOX)
    try:
        async with open_directory(settings, bus, leaders_only=True) as directory:
            yield bus, directory
    finally:
        await bus.close()


async def _connect(settings: Settings, name: str, inbox: str) -> NatsBus:
    from kvbm_service.adapters.nats_bus import NatsBus
    from kvbm_service.adapters.nats_login import TlsFiles

    files = TlsFiles(settings.nats_ca, settings.nats_certificate, settings.nats_key)
    return await NatsBus.connect(
        settings.nats_url, settings.nats_credentials, name, tls=files, inbox=inbox
    )
