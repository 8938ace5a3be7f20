"""What each role may say and hear on a NATS server, and how a server is told.

The subjects are those of `kvbm_schemas/subjects.py`, and of the directory's bucket
(`nats_directory.py`). What is not listed is forbidden. Whoever is asked something may answer it,
for addresses of answers say who is asked. The server's own rule for that, `allow_responses`, is
of no use: it lets one publish wherever a question says, and who asks oneself can say anything.
"""

from __future__ import annotations

from typing import NamedTuple

from kvbm_schemas.subjects import (
    COMMAND_INBOX,
    EVERYTHING,
    REGISTRY_INBOX,
    REGISTRY_NODE,
    ROOT,
    answers_of,
    node_inbox,
)
from kvbm_service.adapters.nats_directory import DEFAULT_BUCKET

REGISTRY_QUEUE = "registry"

_RECORDS = f"$KV.{DEFAULT_BUCKET}"
_STREAM = f"KV_{DEFAULT_BUCKET}"
_DIRECTORY_IS_THERE = f"$JS.API.STREAM.INFO.{_STREAM}"
_UNWATCH = f"$JS.API.CONSUMER.DELETE.{_STREAM}.*"


class Permissions(NamedTuple):
    """What one user may do."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    """A second word is the only queue group that the user may join there."""
    deaf_to: tuple[str, ...] = ()
    """What the user does not hear, although a pattern above covers it."""


def node(namespace: str, *names: str) -> Permissions:
    """A leader and its workers: they speak for this node only, and know this namespace only.

    Several `names` are those of one engine's data-parallel ranks, which log in alike.
    """
    spoken = [f"{ROOT}.{namespace}.*.{name}.*" for name in names]
    records = [f"{_RECORDS}.{namespace}.*.{name}{rank}" for name in names for rank in ("", ".*")]
    return Permissions(
        publish=(
            *spoken,
            *(inbox for name in names for inbox in answers_of(namespace, name)),
            *records,
            f"{ROOT}.{namespace}.*.*.lease",
            f"{ROOT}.{namespace}.*.*.release",
            f"{ROOT}.{namespace}.*.{REGISTRY_NODE}.lookup",
            _DIRECTORY_IS_THERE,
            _watch(f"{namespace}.>"),
            _UNWATCH,
        ),
        subscribe=(*spoken, *(f"{node_inbox(namespace, name)}.>" for name in names)),
    )


def registry(namespace: str = "*") -> Permissions:
    """A registry: it hears all events, and is the only one to be asked where blocks are."""
    asked = f"{ROOT}.{namespace}.*.{REGISTRY_NODE}"
    return Permissions(
        publish=(
            f"{ROOT}.{namespace}.*.*.snapshot",
            f"{asked}.locate",
            *answers_of(namespace, REGISTRY_NODE),
            _DIRECTORY_IS_THERE,
            _watch(f"{namespace}.*.*"),
            _UNWATCH,
        ),
        subscribe=(
            f"{ROOT}.{namespace}.*.*.events",
            f"{asked}.lookup {REGISTRY_QUEUE}",
            f"{asked}.locate {REGISTRY_QUEUE}",
            f"{REGISTRY_INBOX}.>",
        ),
    )


def observer(namespace: str = "*") -> Permissions:
    """Somebody who looks on: `kvbm tap`, `ls` and `locate`. Nothing that changes anything.

    Records of ranks are not for observers: what NIXL needs to reach memory stands in them. Nor
    are leases' tokens, which are in what is said on `release`, and of hand-overs on `lease`.
    """
    everything = EVERYTHING if namespace == "*" else f"{ROOT}.{namespace}.>"
    return Permissions(
        publish=router(namespace).publish,
        subscribe=(everything, f"{COMMAND_INBOX}.>"),
        deaf_to=(f"{ROOT}.*.*.*.release", f"{ROOT}.*.*.*.lease"),
    )


def router(namespace: str = "*") -> Permissions:
    """`kvbm route`: it reads what leaders say of their engines, and asks where blocks are."""
    return Permissions(
        publish=(
            f"{ROOT}.{namespace}.*.{REGISTRY_NODE}.locate",
            _DIRECTORY_IS_THERE,
            _watch(f"{namespace}.*.*"),
            _UNWATCH,
        ),
        subscribe=(f"{COMMAND_INBOX}.>",),
    )


def operator() -> Permissions:
    """Whoever makes the directory's bucket, and may remove it. Speaks for no node."""
    return Permissions(
        publish=("$JS.API.>", f"{ROOT}.*.*.{REGISTRY_NODE}.locate"),
        subscribe=(EVERYTHING, f"{COMMAND_INBOX}.>", "$JS.EVENT.>"),
    )


def as_configuration(permissions: Permissions) -> str:
    """A block for nats-server's configuration, to be included into a user."""
    subscribe = _list("allow", permissions.subscribe)
    if permissions.deaf_to:
        subscribe += _list("deny", permissions.deaf_to)
    text = f"permissions {{\n  publish {{\n{_list('allow', permissions.publish)}  }}\n"
    return f"{text}  subscribe {{\n{subscribe}  }}\n}}\n"


def _list(name: str, subjects: tuple[str, ...]) -> str:
    lines = "".join(f'      "{subject}"\n' for subject in subjects)
    return f"    {name}: [\n{lines}    ]\n"


def _watch(keys: str) -> str:
    """The permission to follow these keys of the directory, and what the request must say."""
    return f"$JS.API.CONSUMER.CREATE.{_STREAM}.*.{_RECORDS}.{keys}"
