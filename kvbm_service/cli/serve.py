"""`kvbm registry` and `kvbm up`: the services, in the foreground until a signal."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbm_service.cli.options import Credentials, NatsUrl, read_settings
from kvbm_service.cli.running import log_as_a_service, run
from kvbm_service.errors import BusError
from kvbm_service.settings import Settings, mask_urls

if TYPE_CHECKING:
    from kvbm_service.adapters.nats_server import EmbeddedNats

DEFAULT_PORT = 4222

STATUS_SECONDS = 2.0
"""How often a registry on a terminal says how it is."""

LOOK_SECONDS = 0.5
"""How often `kvbm up` looks whether its nats-server is still there."""


def registry(nats_url: NatsUrl = None, credentials: Credentials = None) -> None:
    """Run a registry until Ctrl-C. Several of them share the questions."""
    log_as_a_service()
    settings = read_settings(nats_url, credentials)
    run(_serve_registry(settings))


def up(
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Where NATS listens, 4222 if not said; 0: any."),
    ] = None,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            file_okay=False,
            help="Where NATS keeps its state, ~/.local/state/kvbm/nats-PORT if not said.",
        ),
    ] = None,
    nats_url: NatsUrl = None,
    credentials: Credentials = None,
) -> None:
    """Run NATS and a registry on this host until Ctrl-C.

    With --nats-url: only a registry, beside the NATS server that is there already.
    """
    if nats_url and (port is not None or state_dir is not None):
        option = "--port" if port is not None else "--state-dir"
        raise typer.BadParameter(f"with --nats-url no server is started; leave out {option}.")
    log_as_a_service()
    if nats_url:
        run(_up_beside(read_settings(nats_url, credentials)))
    else:
        run(_up(DEFAULT_PORT if port is None else port, state_dir, credentials))


async def _up_beside(settings: Settings) -> None:
    _tell_how_to_connect(settings.nats_url)
    await _serve_registry(settings)


async def _up(port: int, state_dir: Path | None, credentials: str | None) -> None:
    async with _embedded(port, state_dir or _default_state_dir(port)) as server:
        _tell_how_to_connect(server.url)

        def look() -> None:
            if server.pid is None:
                raise BusError("nats-server has ended; start `kvbm up` again")

        await _serve_registry(read_settings(server.url, credentials), look)


@contextlib.asynccontextmanager
async def _embedded(port: int, state_dir: Path | None) -> AsyncIterator[EmbeddedNats]:
    from kvbm_service.adapters.nats_server import EmbeddedNats

    server = EmbeddedNats(port, state_dir)
    try:
        # On this very thread: the server ends with the thread that starts it.
        server.start()
        yield server
    finally:
        server.close()


def _default_state_dir(port: int) -> Path | None:
    """One folder per port, so that two of us do not share one. None: temporary."""
    if port == 0:
        return None
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "kvbm" / f"nats-{port}"


def _tell_how_to_connect(url: str) -> None:
    typer.echo(f"NATS is at {mask_urls(url)}. Engines and the other commands find it with:")
    typer.echo(f"\n  export KVBM_NATS_URL={mask_urls(url)}\n")
    typer.echo("Ctrl-C ends.")
    sys.stdout.flush()


async def _serve_registry(settings: Settings, look: Callable[[], None] = lambda: None) -> None:
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        look()
