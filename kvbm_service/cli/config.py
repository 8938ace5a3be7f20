"""`kvbm config`: every setting, its value, where it came from, what it means."""

from __future__ import annotations

import json
import shutil
import textwrap

import typer

from kvbm_service.cli.options import Credentials, Json, Namespace, NatsUrl, resolve_options
from kvbm_service.settings import TABLE, Resolved, Source
from kvbm_service.unused_settings import why_unused


def config(
    as_json: Json = False,
    nats_url: NatsUrl = None,
    credentials: Credentials = None,
    namespace: Namespace = None,
) -> None:
    """Show every setting: value, source, meaning."""
    resolved = resolve_options(nats_url, credentials, namespace)
    if as_json:
        typer.echo(json.dumps(_as_data(resolved), indent=2))
    else:
        _show(resolved)


def _as_data(resolved: Resolved) -> dict[str, object]:
    settings = [
        {
            "setting": setting.variable,
            "field": field,
            "value": setting.kind.show(getattr(resolved.settings, field)),
            "source": resolved.sources[field],
            "allowed": setting.kind.allowed,
            "meaning": setting.meaning,
        }
        for field, setting in TABLE.items()
    ]
    return {
        "settings": settings,
        "not_used_yet": list(resolved.unused),
        "unknown": dict(resolved.unknown),
    }


def _show(resolved: Resolved) -> None:
    width = shutil.get_terminal_size().columns
    for field, setting in TABLE.items():
        source = resolved.sources[field]
        value = setting.kind.show(getattr(resolved.settings, field))
        text = str(value).lower() if isinstance(value, bool) else str(value) or "(none)"
        typer.secho(f"{setting.variable} = {text}", bold=True, nl=False)
        typer.secho(f"  ({source})", fg=None if source is Source.DEFAULT else "green")
        typer.echo(_indented(setting.meaning, width))
    for name in resolved.unused:
        typer.secho(f"{name}", bold=True, nl=False)
        typer.secho("  not used yet in this version", fg="yellow")
        why = why_unused(name)
        typer.echo(_indented(f"{why[0].upper()}{why[1:]}.", width))
    for name, nearest in resolved.unknown.items():
        typer.secho(f"{name}", bold=True, nl=False)
        typer.secho("  not a setting of ours: ignored", fg="yellow")
        typer.echo(f"    Did you mean {nearest}?")


def _indented(text: str, width: int) -> str:
    return textwrap.fill(text, width, initial_indent="    ", subsequent_indent="    ")
