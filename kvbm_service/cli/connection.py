"""Connections of a command: opened from the settings, closed when it ends."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from kvbm_schemas.subjects import COMMAND_INBOX, REGISTRY_INBOX
from kvbm_service.adapters.directory import Directory
from kvbm_service.network import Network, check_directory, connect_bus, connect_directory
from kvbm_service.settings import Settings

if TYPE_CHECKING:
    from kvbm_service.adapters.nats_bus import NatsBus

_COMMAND = "kvbm command"
"""What the NATS server lists a command as."""

_adapters_log = logging.getLogger("kvbm_service.adapters")


@asynccontextmanager
async def open_bus(settings: Settings) -> AsyncIterator[NatsBus]:
    """A bus that is connected: a command, unlike a service, does not wait for NATS to appear.

    Raises:
        BusUnavailable: NATS cannot be reached, or refuses us.
    """
    with _errors_only():
        bus = await connect_bus(settings, _COMMAND, COMMAND_INBOX)
    try:
        assert bus.client is not None  # raises, with the reason, when there is no connection
        yield bus
    finally:
        await bus.close()


@asynccontextmanager
async def open_directory(settings: Settings, bus: NatsBus) -> AsyncIterator[Directory]:
    """The directory of the cluster that `bus` belongs to; a command does not wait for it either.

    Raises:
        BusUnavailable: it is on another NATS server, which refuses us.
    """
    with _errors_only():
        directory = await connect_directory(settings, bus, _COMMAND, COMMAND_INBOX)
        try:
            yield directory
        finally:
            await directory.close()


@asynccontextmanager
async def open_network(
    settings: Settings, name: str, inbox: str = REGISTRY_INBOX
) -> AsyncIterator[Network]:
    """A bus and a directory for a service, which waits for servers that are not there yet.

    Raises:
        BusUnavailable: NATS refuses us.
    """
    check_directory(settings)
    bus = await connect_bus(settings, name, inbox)
    try:
        directory = await connect_directory(settings, bus, name, inbox, leaders_only=True)
    except BaseException:
        await bus.close()
        raise
    network = Network(bus, directory)
    try:
        yield network
    finally:
        await network.close()


@contextmanager
def _errors_only() -> Iterator[None]:
    """While a command does what it may fail at: its error says it already, in one line."""
    level = _adapters_log.level
    _adapters_log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        _adapters_log.setLevel(level)
