"""`kvbm registry` and `kvbm up`: the services, in the foreground until a signal."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from kvbm_schemas.codec import encode
from kvbm_schemas.requests import Locate
from kvbm_schemas.subjects import REGISTRY_INBOX, REGISTRY_NODE, Scope
from kvbm_service.adapters.bus import Bus
from kvbm_service.cli.connection import open_network
from kvbm_service.cli.options import Credentials, NatsUrl, read_settings
from kvbm_service.cli.readable import size
from kvbm_service.cli.running import log_as_a_service, run, status_line
from kvbm_service.errors import BusError, KvbmError, PortTaken
from kvbm_service.network import connect_bus
from kvbm_service.setting_kind import mask_urls
from kvbm_service.settings import Settings

if TYPE_CHECKING:
    from kvbm_service.adapters.embedded_server import EmbeddedServer
    from kvbm_service.adapters.etcd_server import EmbeddedEtcd
    from kvbm_service.adapters.nats_server import EmbeddedNats
    from kvbm_service.registry_service import RegistryStatus

_log = logging.getLogger(__name__)

DEFAULT_PORT = 4222

LOOK_SECONDS = 0.5
"""How often a service looks how it is."""


def registry(nats_url: NatsUrl = None, credentials: Credentials = None) -> None:
    """Run a registry until Ctrl-C. Several of them share the questions."""
    log_as_a_service()
    settings = read_settings(nats_url, credentials)
    run(_serve_registry(settings))


def up(
    port: Annotated[
        int | None,
        typer.Option(
            metavar="PORT", min=0, max=65535, help="Where NATS listens, 4222 if not said; 0: any."
        ),
    ] = None,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            file_okay=False,
            help="State of NATS and etcd. Default: ~/.local/state/kvbm.",
        ),
    ] = None,
    etcd: Annotated[
        bool, typer.Option("--etcd", help="Run etcd, too, and let it be the directory.")
    ] = False,
    nats_url: NatsUrl = None,
    credentials: Credentials = None,
) -> None:
    """Run NATS and a registry on this host until Ctrl-C.

    With --nats-url: only a registry, beside the NATS server that is there already.

    \b
    Examples:
      kvbm up
      kvbm up --port 0 --state-dir /var/lib/kvbm
      kvbm up --etcd
      kvbm up --nats-url nats://10.0.0.1:4222
    """
    options = {"--port": port is not None, "--state-dir": state_dir is not None, "--etcd": etcd}
    given = [option for option, is_given in options.items() if is_given]
    if nats_url and given:
        raise typer.BadParameter(f"with --nats-url no server is started; leave out {given[0]}.")
    log_as_a_service()
    if nats_url:
        run(_up_beside(read_settings(nats_url, credentials)))
    else:
        run(_up(DEFAULT_PORT if port is None else port, state_dir, credentials, with_etcd=etcd))


async def _up_beside(settings: Settings) -> None:
    _tell_how_to_connect(settings)
    await _serve_registry(settings)


async def _up(
    port: int, state_dir: Path | None, credentials: str | None, *, with_etcd: bool
) -> None:
    state_dir = state_dir or _default_state_dir(port)
    with contextlib.ExitStack() as servers:
        nats = servers.enter_context(_embedded_nats(port, state_dir))
        settings = read_settings(nats.url, credentials)
        running: list[EmbeddedServer] = [nats]
        if with_etcd:
            etcd = servers.enter_context(_embedded_etcd(state_dir))
            settings = msgspec.structs.replace(settings, directory_url=etcd.url)
            running.append(etcd)
        _tell_how_to_connect(settings)

        def look() -> None:
            for server in running:
                if server.pid is None:
                    raise KvbmError(f"{server.NAME} has ended; start `kvbm up` again")

        await _serve_registry(settings, look)


def _embedded_etcd(state_dir: Path | None) -> EmbeddedEtcd:
    from kvbm_service.adapters.etcd_server import EmbeddedEtcd

    return EmbeddedEtcd(store_dir=state_dir / "etcd" if state_dir else None)


@contextlib.contextmanager
def _embedded_nats(port: int, state_dir: Path | None) -> Iterator[EmbeddedNats]:
    from kvbm_service.adapters.nats_server import EmbeddedNats

    server = EmbeddedNats(port, state_dir)
    try:
        try:
            server.start()
        except PortTaken:
            raise PortTaken(
                f"port {port} is in use: stop what listens there, choose another with --port "
                "(0 for a free one), or use the NATS server there with --nats-url"
            ) from None
        yield server
    finally:
        server.close()


def _default_state_dir(port: int) -> Path | None:
    """One folder per port, so that two of us do not share one. None: temporary."""
    if port == 0:
        return None
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "kvbm" / f"nats-{port}"


def _tell_how_to_connect(settings: Settings) -> None:
    nats, directory = mask_urls(settings.nats_url), mask_urls(settings.directory_url)
    typer.echo(f"NATS is at {nats}. Engines and the other commands find it with:")
    typer.echo(f"\n  export KVBM_NATS_URL={nats}")
    typer.echo(f"  export KVBM_DIRECTORY_URL={directory}\n" if directory else "")
    typer.echo("Ctrl-C ends.")
    sys.stdout.flush()


async def _serve_registry(settings: Settings, look: Callable[[], None] = lambda: None) -> None:
    """Serve until cancelled. Every now and then, `look` may raise to end it."""
    from kvbm_service.registry_service import RegistryService

    async with (
        open_network(settings, "kvbm registry") as (bus, directory),
        _bus_for_events(settings) as events,
    ):
        service = RegistryService(bus, directory, events=events, wire=settings.wire)
        running = asyncio.create_task(service.run())
        try:
            with status_line() as show:
                await _until_it_answers(bus, settings, running, look)
                _log.info("registry answers, on NATS at %s", mask_urls(settings.nats_url))
                while not running.done():
                    show(_in_words(service.status()))
                    look()
                    await asyncio.sleep(LOOK_SECONDS)
            await running
        finally:
            running.cancel()
            await asyncio.wait([running])


@contextlib.asynccontextmanager
async def _bus_for_events(settings: Settings) -> AsyncIterator[Bus]:
    """A connection of their own: questions do not wait behind a flood of events."""
    bus = await connect_bus(settings, "kvbm registry events", REGISTRY_INBOX)
    try:
        yield bus
    finally:
        await bus.close()


async def _until_it_answers(
    bus: Bus, settings: Settings, running: asyncio.Task[None], look: Callable[[], None]
) -> None:
    """Return once a registry answers questions, or ours has ended."""
    subject = Scope(settings.namespace, "anything").of(REGISTRY_NODE, "locate")
    while not running.done():
        look()
        try:
            await bus.request(subject, encode(Locate(hashes=b"")), LOOK_SECONDS)
        except BusError:
            await asyncio.sleep(LOOK_SECONDS / 5)
        else:
            return


def _in_words(status: RegistryStatus) -> str:
    counts = status.counts
    parts = [
        f"{_number(status.nodes, 'node')}",
        f"{_number(status.blocks, 'block')} ({size(status.bytes_held)})",
        f"{_number(counts.applied, 'event')}",
        f"{_number(counts.lookups, 'lookup')}",
    ]
    if status.syncing:
        parts.append(f"{status.syncing} syncing")
    if counts.malformed:
        parts.append(f"{counts.malformed} malformed")
    refused_nodes = counts.refused_nodes + counts.refused_scopes
    if refused_nodes:
        parts.append(f"{_number(refused_nodes, 'node')} refused")
    if status.refused_blocks:
        parts.append(f"{_number(status.refused_blocks, 'block')} refused")
    return "registry: " + ", ".join(parts if status.connected else ["no NATS", *parts])


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
