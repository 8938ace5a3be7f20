"""`kvbm tap` and `kvbm decode`: what goes over the bus, readable."""

from __future__ import annotations

import asyncio
import datetime
import json
import sys
from collections.abc import Callable
from typing import Annotated, get_args

import typer

from kvbm_schemas.codec import AnyMessage, Decoder, Malformed
from kvbm_schemas.message import MAX_MESSAGE_BYTES, Message
from kvbm_schemas.subjects import EVERYTHING, parse
from kvbm_service.adapters.bus import Delivery
from kvbm_service.cli.connection import open_bus
from kvbm_service.cli.options import Credentials, Full, Json, Namespace, NatsUrl, read_settings
from kvbm_service.cli.readable import as_data, as_line, printable
from kvbm_service.cli.running import run
from kvbm_service.errors import KvbmError, SettingError
from kvbm_service.setting_kind import mask_urls
from kvbm_service.settings import Settings

MAX_WAITING = 10_000
"""Messages that wait for a slow terminal; more are counted and left out."""

_decoder: Decoder[AnyMessage] = Decoder(AnyMessage)  # type: ignore[arg-type]

_TYPES = sorted(str(kind.__struct_config__.tag) for kind in get_args(AnyMessage))


def decode(as_json: Json = False, full: Full = False) -> None:
    """Decode one payload from stdin, msgpack or JSON.

    \b
    Examples:
      nats sub 'kvbm.>' --translate 'kvbm decode'
      kvbm decode --json < payload
    """
    if sys.stdin.isatty():
        raise KvbmError("nothing to decode: pipe a payload into stdin; see `kvbm decode --help`")
    payload = sys.stdin.buffer.read(MAX_MESSAGE_BYTES + 1)
    try:
        message = _decoder.decode(payload)
    except Malformed as error:
        raise KvbmError(f"not one of our messages: {printable(str(error))}") from None
    typer.echo(json.dumps(as_data(message)) if as_json else as_line(message, full))


def tap(
    subject: Annotated[
        str, typer.Option(metavar="PATTERN", help="NATS subject; * and > are wildcards.")
    ] = "",
    types: Annotated[
        str, typer.Option("--type", metavar="TYPES", help=f"Of {', '.join(_TYPES)}.")
    ] = "",
    count: Annotated[int, typer.Option(min=0, help="End after this many messages; 0: never.")] = 0,
    as_json: Json = False,
    full: Full = False,
    nats_url: NatsUrl = None,
    credentials: Credentials = None,
    namespace: Namespace = None,
) -> None:
    """Watch what goes over the bus, decoded, until Ctrl-C.

    \b
    Examples:
      kvbm tap --type stored,removed
      kvbm tap --subject 'kvbm.*.*.node-a.>' --full
      kvbm tap --type lookup --count 10 --json
    """
    settings = read_settings(nats_url, credentials, namespace)
    pattern = subject or (f"kvbm.{settings.namespace}.>" if namespace else EVERYTHING)
    show = _as_json if as_json else _as_text(full)
    run(_tap(settings, pattern, _read_types(types), count, show))


def _read_types(types: str) -> set[str]:
    wanted = {name.strip().lower() for name in types.split(",") if name.strip()}
    if not wanted <= set(_TYPES):
        raise SettingError("--type", types, ", ".join(_TYPES))
    return wanted


Show = Callable[[Delivery, Message | None, str], str]


async def _tap(settings: Settings, pattern: str, types: set[str], count: int, show: Show) -> None:
    waiting: asyncio.Queue[Delivery] = asyncio.Queue(MAX_WAITING)
    left_out = 0

    async def take(delivery: Delivery) -> None:
        nonlocal left_out
        try:
            waiting.put_nowait(delivery)
        except asyncio.QueueFull:
            left_out += 1

    async with open_bus(settings) as bus:
        await bus.subscribe(pattern, take)
        typer.echo(
            f"listening on {pattern} at {mask_urls(settings.nats_url)}; Ctrl-C ends", err=True
        )
        shown = 0
        while not count or shown < count:
            delivery = await waiting.get()
            message, problem = _read(delivery)
            if types and (message is None or message.__struct_config__.tag not in types):
                continue
            typer.echo(show(delivery, message, problem))
            sys.stdout.flush()
            shown += 1
            if left_out:
                typer.echo(f"{left_out} messages left out: they come too fast to show", err=True)
                left_out = 0


def _read(delivery: Delivery) -> tuple[Message | None, str]:
    try:
        return _decoder.decode(delivery.payload), ""
    except Malformed as error:
        return None, str(error)


def _as_json(delivery: Delivery, message: Message | None, problem: str) -> str:
    subject = parse(delivery.subject)
    line: dict[str, object] = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "subject": delivery.subject,
        **(subject._asdict() if subject else {}),
    }
    if message is None:
        return json.dumps({**line, "malformed": problem})
    return json.dumps({**line, "message": as_data(message)})


def _as_text(full: bool) -> Show:
    def show(delivery: Delivery, message: Message | None, problem: str) -> str:
        subject = parse(delivery.subject)
        who = subject.node if subject and not full else printable(delivery.subject)
        what = as_line(message, full) if message else f"malformed: {printable(problem)}"
        now = datetime.datetime.now().astimezone().strftime("%H:%M:%S.%f")[:-3]
        colour = _COLOURS.get(what.split()[0])
        return f"{now}  {typer.style(who, bold=True)}  {typer.style(what, fg=colour)}"

    return show


_COLOURS = {"stored": "green", "removed": "yellow", "cleared": "red", "malformed:": "red"}
