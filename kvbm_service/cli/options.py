"""Options that several commands share, and the settings they lead to."""

from __future__ import annotations

import logging
import os
from typing import Annotated

import typer

from kvbm_service.settings import Layer, Resolved, Settings, Source, resolve

_log = logging.getLogger(__name__)

NatsUrl = Annotated[
    str | None,
    typer.Option(
        "--nats-url",
        metavar="URL",
        help="NATS. Default: KVBM_NATS_URL.",
        show_default=False,
    ),
]
Credentials = Annotated[
    str | None,
    typer.Option(
        "--credentials",
        metavar="FILE",
        help="A .creds file. Default: KVBM_NATS_CREDENTIALS.",
        show_default=False,
    ),
]
Namespace = Annotated[
    str | None,
    typer.Option("--namespace", metavar="NAME", help="Only this namespace.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Full = Annotated[bool, typer.Option("--full", help="Print whole hashes, and all of them.")]


def resolve_options(
    nats_url: str | None = None, credentials: str | None = None, namespace: str | None = None
) -> Resolved:
    """The settings from the environment, with these options on top.

    Raises:
        SettingError: a value is not allowed.
    """
    given = {"--nats-url": nats_url, "--credentials": credentials, "--namespace": namespace}
    options = {name: value for name, value in given.items() if value is not None}
    return resolve([Layer(Source.ENVIRONMENT, os.environ), Layer(Source.COMMAND_LINE, options)])


def read_settings(
    nats_url: str | None = None, credentials: str | None = None, namespace: str | None = None
) -> Settings:
    """As `resolve_options`, logging what is probably a mistake."""
    resolved = resolve_options(nats_url, credentials, namespace)
    for notice in resolved.notices:
        _log.warning(notice)
    return resolved.settings
