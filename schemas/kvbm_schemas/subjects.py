"""NATS subjects, built and parsed in this one place.

    kvbm.<namespace>.<fingerprint>.<node>.<what>

| what       | who publishes     | who listens          | payload                            |
|------------|-------------------|----------------------|------------------------------------|
| `events`   | the node's leader | registries, tap      | `Stored` `Removed` `Cleared` `Beat`|
| `loads`    | the node's leader | tap                  | `Loaded`                           |
| `lease`    | other leaders     | the node's leader    | `Acquire` → `Leased` or `Refused`, |
|            |                   |                      | `Renew`                            |
| `release`  | other leaders     | the node's leader    | `Release`                          |
| `snapshot` | registries        | the node's leader    | `Resync` → `SnapshotChunk` …       |
| `rank-0` … | the node's leader | that rank's worker   | `Fetch` or `Lend` → `Moved`,       |
|            |                   |                      | `Expect`                           |
| `lookup`   | leaders           | registries (queue)   | `Lookup` → `Located`               |
| `locate`   | commands, routers | registries (queue)   | `Locate` → `Placements`            |

The last two are asked of the node called `registry`, a name no node may have.

Answers go to an inbox of the asker, which a server with permissions lets nobody else hear, and
which says who is asked, so that it lets nobody else answer:

    _INBOX.node.<namespace>.<node>.<random>.<asked>.<number>   a node's leader and workers
    _INBOX.registry.<random>.<asked>.<number>                  registries
    _INBOX.command.<random>.<asked>.<number>                   commands, routers

`asked` is `<namespace>.<node>`, the node being `registry` where one of those is asked; `$.$` is
whoever is asked on other subjects than ours.
"""

from __future__ import annotations

import re
from typing import NamedTuple

ROOT = "kvbm"
REGISTRY_NODE = "registry"
EVERYTHING = f"{ROOT}.>"

INBOXES = ("_INBOX.", "_INBOX_")
"""How addresses of answers begin, those of other clients too. Nothing is answered elsewhere."""
REGISTRY_INBOX = "_INBOX.registry"
COMMAND_INBOX = "_INBOX.command"
ASKED_ELSEWHERE = "$.$"
"""In an address of answers: not one of us is asked."""

_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Subject(NamedTuple):
    """One parsed subject."""

    namespace: str
    fingerprint: str
    node: str
    what: str

    def __str__(self) -> str:
        return f"{ROOT}.{self.namespace}.{self.fingerprint}.{self.node}.{self.what}"


class Scope(NamedTuple):
    """Who can share blocks: an operator's name, and one layout of bytes."""

    namespace: str
    fingerprint: str

    def of(self, node: str, what: str) -> str:
        """The subject of `what` at `node`."""
        return str(Subject(self.namespace, self.fingerprint, node, what))


def node_inbox(namespace: str, node: str) -> str:
    """Where a node's answers come."""
    return f"_INBOX.node.{namespace}.{node}"


def answers_of(namespace: str, who: str) -> tuple[str, ...]:
    """Where all answers of `who`, a node or `registry`, go."""
    askers = (node_inbox(namespace, "*"), REGISTRY_INBOX, COMMAND_INBOX)
    return tuple(f"{asker}.*.{namespace}.{who}.*" for asker in askers)


def asked(subject: str) -> str:
    """Who is asked there, as an address of answers says it."""
    parsed = parse(subject)
    return f"{parsed.namespace}.{parsed.node}" if parsed is not None else ASKED_ELSEWHERE


def rank_what(rank: int) -> str:
    """The last token of the subject that a rank listens to."""
    return f"rank-{rank}"


def is_token(name: str) -> bool:
    """Whether `name` can be one token of a subject."""
    return _TOKEN.fullmatch(name) is not None


def every(what: str, node: str = "*") -> str:
    """The pattern that hears `what` in all scopes."""
    return f"{ROOT}.*.*.{node}.{what}"


def parse(subject: str) -> Subject | None:
    """Take a subject apart; None if it is not one of ours."""
    parts = subject.split(".")
    if len(parts) != 5 or parts[0] != ROOT or not all(map(is_token, parts[1:])):
        return None
    return Subject(*parts[1:])
