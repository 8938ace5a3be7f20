"""The root command: its options, and the commands below it."""

from __future__ import annotations

import typer

from kvbm_service.cli import bench, cluster, config, permissions, replay, route, serve, show, watch
from kvbm_service.cli.options import Credentials, Namespace, NatsUrl

_HELP = """A KV-block cache shared by LLM engines, over NATS.

\b
Examples:
  kvbm up                         start NATS and a registry on this host
  kvbm route --port 8000          one OpenAI-compatible front for all engines
  kvbm config                     every setting, and where its value came from
  kvbm ls                         who takes part, and how full their tiers are
  kvbm locate 9f86d081884c7d65…   who holds this block, and in which tier
  kvbm tap --type stored,removed  watch blocks come and go
  nats sub 'kvbm.>' --translate 'kvbm decode'

KVBM_NATS_URL says where NATS is; `kvbm config` shows what else can be set.
"""

app = typer.Typer(
    help=_HELP,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

_COMMANDS = (
    serve.up,
    serve.registry,
    route.route,
    cluster.ls,
    cluster.locate,
    watch.tap,
    watch.decode,
    config.config,
    permissions.permissions,
    show.demo,
    replay.replay,
)

for command in _COMMANDS:
    app.command()(command)
app.add_typer(bench.app, name="bench")


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    nats_url: NatsUrl = None,
    credentials: Credentials = None,
    namespace: Namespace = None,
) -> None:
    # An option given before the command counts for the command.
    given = {"nats_url": nats_url, "credentials": credentials, "namespace": namespace}
    defaults = {name: value for name, value in given.items() if value is not None}
    context.default_map = {command.__name__: defaults for command in _COMMANDS}
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
