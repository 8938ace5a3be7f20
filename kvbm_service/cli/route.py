"""`kvbm route`: one front for several engines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from kvbm_schemas.subjects import COMMAND_INBOX
from kvbm_service.cli.connection import open_network
from kvbm_service.cli.options import Credentials, Namespace, NatsUrl, read_settings
from kvbm_service.cli.running import log_as_a_service, run
from kvbm_service.errors import SettingError
from kvbm_service.setting_kind import HTTP_URL, parse_http_url
from kvbm_service.settings import Settings

if TYPE_CHECKING:
    from kvbm_service.route.fleet import Engine
    from kvbm_service.route.service import Options

_Urls = list[str] | None


def route(
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Where to listen; 0: any.")] = 8000,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="0.0.0.0 is every address of this machine.")
    ] = "127.0.0.1",
    engine: Annotated[
        _Urls, typer.Option(metavar="URL", help="An engine that does all of it. Repeatable.")
    ] = None,
    prefill: Annotated[
        _Urls, typer.Option(metavar="URL", help="An engine that computes prompts. Repeatable.")
    ] = None,
    decode: Annotated[
        _Urls, typer.Option(metavar="URL", help="An engine that answers them. Repeatable.")
    ] = None,
    membership: Annotated[
        bool,
        typer.Option(help="Take engines from membership, too, and ask registries for prefixes."),
    ] = True,
    prefill_blocks: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="BLOCKS",
            help="A decode engine computes a prompt itself if it lacks fewer than these.",
        ),
    ] = 2,
    max_requests: Annotated[
        int, typer.Option(min=1, help="Requests under way; further ones get a 503.")
    ] = 4096,
    idle_timeout: Annotated[
        float,
        typer.Option(min=1, metavar="SECONDS", help="How long an engine may say nothing."),
    ] = 600.0,
    drain: Annotated[
        float,
        typer.Option(min=0, metavar="SECONDS", help="How long requests may take to end at a stop."),
    ] = 30.0,
    nats_url: NatsUrl = None,
    credentials: Credentials = None,
    namespace: Namespace = None,
) -> None:
    """Serve OpenAI's interface in front of several engines, until Ctrl-C.

    A prompt goes to the engine that has the longest prefix of it, weighed against what the
    engines have to do already. Engines that are started with KVBM_ENGINE_URL are found by
    themselves; others are named here. With prefill and decode engines, the one computes the
    prompt, the other fetches its blocks and answers.

    An engine that dies is left out until /health says that it is well; requests that it has not
    begun to answer go to another one.

    \b
    Examples:
      KVBM_ENGINE_URL=http://10.0.0.1:8001 vllm serve …       an engine that is found
      kvbm route --port 8000
      kvbm route --engine http://10.0.0.1:8001 --engine http://10.0.0.2:8001
      kvbm route --prefill http://10.0.0.1:8001 --decode http://10.0.0.2:8001
      kvbm route --engine http://127.0.0.1:8001 --no-membership      without NATS
      curl localhost:8000/health; curl localhost:8000/metrics
    """
    from kvbm_service.route.fleet import Role
    from kvbm_service.route.service import Options

    given = {"--engine": engine, "--prefill": prefill, "--decode": decode}
    roles = {"--engine": Role.BOTH, "--prefill": Role.PREFILL, "--decode": Role.DECODE}
    engines: dict[str, Role] = {}
    for option, urls in given.items():
        for url in _parse(option, urls or ()):
            if engines.setdefault(url, roles[option]) is not roles[option]:
                raise SettingError(option, url, f"it is named as {engines[url]} already")
    if not engines and not membership:
        raise SettingError("--no-membership", True, "name engines with --engine, then")
    log_as_a_service()
    settings = read_settings(nats_url, credentials, namespace)
    options = Options(
        host=host,
        port=port,
        engines=tuple(engines.items()),
        namespace=settings.namespace,
        deadline_seconds=settings.route_deadline_seconds,
        prefill_blocks=prefill_blocks,
        max_requests=max_requests,
        idle_seconds=idle_timeout,
        drain_seconds=drain,
    )
    run(_route(settings, options, membership))


def _parse(option: str, urls: Sequence[str]) -> list[str]:
    try:
        return [parse_http_url(url) for url in urls]
    except ValueError:
        raise SettingError(option, HTTP_URL.show_refused(",".join(urls)), HTTP_URL.allowed) from (
            None
        )


async def _route(settings: Settings, options: Options, membership: bool) -> None:
    from kvbm_service.route.service import RouteService

    async with AsyncExitStack() as stack:
        network = None
        if membership:
            network = await stack.enter_async_context(
                open_network(settings, "kvbm route", COMMAND_INBOX)
            )
        await RouteService(options, network, on_ready=_say_where).run()


def _say_where(url: str, engines: list[Engine]) -> None:
    shown = ", ".join(f"{engine}{'' if engine.healthy else ' (not ready)'}" for engine in engines)
    typer.echo(f"routing on {url} to {shown or 'no engine yet'}. Ctrl-C ends.")
    sys.stdout.flush()
