"""`kvbm permissions`: what a role may do on a NATS server, for its configuration."""

from __future__ import annotations

import enum
from typing import Annotated

import typer

from kvbm_service.cli.options import Namespace
from kvbm_service.errors import SettingError
from kvbm_service.setting_kind import NODE_NAME, TOKEN, Kind

DEFAULT_NAMESPACE = "default"
ANY_NAMESPACE = "*"


class Role(enum.StrEnum):
    """Who takes part."""

    NODE = "node"
    REGISTRY = "registry"
    OBSERVER = "observer"
    ROUTER = "router"
    OPERATOR = "operator"


def permissions(
    role: Annotated[Role, typer.Argument(help="Whose permissions.")],
    node: Annotated[
        list[str] | None,
        typer.Option(
            "--node",
            metavar="NAME",
            help="The node's KVBM_NODE_NAME. With data parallelism: NAME-dp0, NAME-dp1 and so on.",
        ),
    ] = None,
    namespace: Namespace = None,
) -> None:
    """Print what a role may do on a NATS server, to be included into its configuration.

    A node's are for the namespace `default` if none is given, all others' for every one.

    \b
    Examples:
      kvbm permissions node --node node-3 > node-3.conf
      kvbm permissions observer --namespace team-a > observer-team-a.conf
    """
    from kvbm_service.adapters import nats_permissions  # brings nats-py along

    if namespace is not None:
        _check("--namespace", namespace, TOKEN)
    if role is not Role.NODE and node:
        raise SettingError("--node", node[0], f"one {role} may do as much as another")
    if role is Role.NODE:
        for name in node or [""]:
            _check("--node", name, NODE_NAME)
        allowed = nats_permissions.node(namespace or DEFAULT_NAMESPACE, *node or ())
    elif role is Role.REGISTRY:
        allowed = nats_permissions.registry(namespace or ANY_NAMESPACE)
    elif role is Role.OBSERVER:
        allowed = nats_permissions.observer(namespace or ANY_NAMESPACE)
    elif role is Role.ROUTER:
        allowed = nats_permissions.router(namespace or ANY_NAMESPACE)
    else:
        allowed = nats_permissions.operator()
    typer.echo(nats_permissions.as_configuration(allowed), nl=False)


def _check(option: str, value: str, kind: Kind) -> None:
    try:
        kind.parse(value or None)
    except ValueError:
        raise SettingError(option, value, kind.allowed) from None
