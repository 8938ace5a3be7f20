"""`kvbm ls` and `kvbm locate`: who takes part, and who holds what."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from kvbm_schemas.block import HASH_BYTES, pack
from kvbm_schemas.codec import Decoder, Malformed, encode
from kvbm_schemas.records import DirectoryRecord, NodeRecord, RankRecord
from kvbm_schemas.requests import Holder, Locate, Placements
from kvbm_schemas.subjects import REGISTRY_NODE, Scope
from kvbm_service.adapters.bus import Bus
from kvbm_service.adapters.directory import Entry
from kvbm_service.cli.connection import open_bus, open_directory
from kvbm_service.cli.options import Credentials, Json, Namespace, NatsUrl, read_settings
from kvbm_service.cli.readable import size
from kvbm_service.cli.running import run
from kvbm_service.errors import KvbmError, NoAnswer, SettingError
from kvbm_service.setting_kind import TOKEN
from kvbm_service.settings import Settings

if TYPE_CHECKING:
    from kvbm_service.adapters.nats_bus import NatsBus

ANSWER_SECONDS = 2.0
"""How long a registry may take to answer."""

_records: Decoder[DirectoryRecord] = Decoder(DirectoryRecord)  # type: ignore[arg-type]
_placements = Decoder(Placements)


class Node(NamedTuple):
    """A node as the directory shows it. `ranks` are those that have reported."""

    scope: Scope
    record: NodeRecord
    ranks: list[int]
    age_seconds: float


def ls(
    as_json: Json = False,
    nats_url: NatsUrl = None,
    credentials: Credentials = None,
    namespace: Namespace = None,
) -> None:
    """List the nodes: their ranks, and how full their tiers are."""
    settings = read_settings(nats_url, credentials, namespace)
    run(_ls(settings, namespace, as_json))


async def _ls(settings: Settings, namespace: str | None, as_json: bool) -> None:
    async with open_bus(settings) as bus, open_directory(settings, bus) as directory:
        nodes, unreadable = _nodes(await directory.entries(f"{namespace}." if namespace else ""))
    if as_json:
        typer.echo(json.dumps([_node_as_data(node) for node in nodes], indent=2))
    elif nodes:
        _show_nodes(nodes)
    else:
        typer.echo(f"No nodes{f' in namespace {namespace}' if namespace else ''}.")
    if unreadable:
        records = "record" if unreadable == 1 else "records"
        typer.echo(f"{unreadable} {records} of the directory could not be read.", err=True)


def _nodes(entries: Iterable[Entry]) -> tuple[list[Node], int]:
    """The nodes in order, and how many records made no sense."""
    nodes: dict[str, Node] = {}
    ranks: dict[str, list[int]] = defaultdict(list)
    unreadable = 0
    for entry in entries:
        try:
            record = _records.decode(entry.value)
        except Malformed:
            unreadable += 1
            continue
        tokens = entry.key.split(".")
        if isinstance(record, NodeRecord) and len(tokens) == 3:
            nodes[entry.key] = Node(Scope(*tokens[:2]), record, ranks[entry.key], entry.age_seconds)
        elif isinstance(record, RankRecord) and len(tokens) == 4:
            ranks[".".join(tokens[:3])].append(record.rank)
        else:
            unreadable += 1
    for found in ranks.values():
        found.sort()
    return [nodes[key] for key in sorted(nodes)], unreadable


def _node_as_data(node: Node) -> dict[str, object]:
    record = node.record
    return {
        "namespace": node.scope.namespace,
        "fingerprint": node.scope.fingerprint,
        "node": record.node,
        "epoch": record.epoch,
        "engine": record.engine,
        "world_size": record.world_size,
        "ranks": node.ranks,
        "block_bytes": record.block_bytes,
        "tiers": [
            {
                "tier": tier.tier,
                "capacity": tier.capacity,
                "used": tier.used,
                "pinned": tier.pinned,
            }
            for tier in record.tiers
        ],
        "last_seen_seconds": round(node.age_seconds, 3),
    }


def _show_nodes(nodes: list[Node]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for scope in sorted({node.scope for node in nodes}):
        console.print(Text(f"namespace {scope.namespace} · layout {scope.fingerprint}", "bold"))
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        table.add_column("node", overflow="fold")
        table.add_column("epoch", no_wrap=True)
        for heading in ("ranks", "tier", "used", "of", "size", "pinned", "seen"):
            table.add_column(heading, justify="right", no_wrap=True)
        for node in nodes:
            if node.scope == scope:
                for row in _rows(node):
                    table.add_row(*(Text(cell) for cell in row))
        console.print(table)
        console.print()


def _rows(node: Node) -> list[list[str]]:
    """A line for each tier; what concerns the whole node stands in the first."""
    record = node.record
    tiers = [
        [
            tier.tier,
            str(tier.used),
            str(tier.capacity),
            size(tier.capacity * record.block_bytes),
            str(tier.pinned),
        ]
        for tier in record.tiers
    ] or [["-"] * 5]
    ranks = f"{len(node.ranks)}/{record.world_size}"
    first = [record.node, str(record.epoch), ranks, *tiers[0], f"{node.age_seconds:.1f} s"]
    return [first, *(["", "", "", *tier, ""] for tier in tiers[1:])]


def locate(
    hashes: Annotated[
        list[str],
        typer.Argument(
            metavar="HASH", help="32 hex digits; longer ones are cut to their first 32."
        ),
    ],
    as_json: Json = False,
    nats_url: NatsUrl = None,
    credentials: Credentials = None,
    namespace: Namespace = None,
    fingerprint: Annotated[
        str | None, typer.Option(metavar="LAYOUT", help="Only this layout, as in `kvbm ls`.")
    ] = None,
) -> None:
    """Say which nodes hold a block, and in which tier.

    \b
    Examples:
      kvbm locate 9f86d081884c7d659a2feaa0c55ad015
      kvbm locate --json $(cat hashes)
    """
    settings = read_settings(nats_url, credentials, namespace)
    if fingerprint is not None:
        _check_fingerprint(fingerprint)
    names = [_block_name(text) for text in hashes]
    run(_locate(settings, names, namespace, fingerprint, as_json))


def _check_fingerprint(text: str) -> None:
    try:
        TOKEN.parse(text)
    except ValueError:
        raise SettingError("--fingerprint", text, TOKEN.allowed) from None


def _block_name(text: str) -> bytes:
    digits = text.lower().removeprefix("0x")
    if not re.fullmatch(rf"[0-9a-f]{{{2 * HASH_BYTES},}}", digits):
        allowed = f"{2 * HASH_BYTES} hex digits, or more, of which the first count"
        raise SettingError("HASH", text, allowed)
    return bytes.fromhex(digits[: 2 * HASH_BYTES])


Found = list[tuple[Scope, Holder]]


async def _locate(
    settings: Settings,
    names: list[bytes],
    namespace: str | None,
    fingerprint: str | None,
    as_json: bool,
) -> None:
    async with open_bus(settings) as bus:
        scopes = await _scopes(settings, bus, namespace, fingerprint)
        found: list[Found] = [[] for _ in names]
        for scope in scopes:
            placements = await _ask(bus, scope, names)
            for one, holders in zip(found, placements.holders, strict=True):
                one.extend((scope, holder) for holder in holders)
    _show_found(names, found, as_json)


async def _scopes(
    settings: Settings, bus: NatsBus, namespace: str | None, fingerprint: str | None
) -> list[Scope]:
    """The scopes of the directory's nodes, as far as they were not ruled out."""
    if namespace and fingerprint:
        return [Scope(namespace, fingerprint)]
    async with open_directory(settings, bus) as directory:
        nodes, _ = _nodes(await directory.entries(f"{namespace}." if namespace else ""))
    known = {node.scope for node in nodes}
    return sorted(scope for scope in known if fingerprint in (None, scope.fingerprint))


async def _ask(bus: Bus, scope: Scope, names: list[bytes]) -> Placements:
    subject = scope.of(REGISTRY_NODE, "locate")
    question = encode(Locate(hashes=pack(names)))
    try:
        answer = _placements.decode(await bus.request(subject, question, ANSWER_SECONDS))
    except NoAnswer:
        raise NoAnswer(
            "no registry answers: start one with `kvbm registry` (or `kvbm up`), "
            "with the same --nats-url"
        ) from None
    except Malformed as error:
        raise KvbmError(f"the registry's answer cannot be read: {error}") from None
    if len(answer.holders) != len(names):
        raise KvbmError("the registry's answer does not fit the question: are versions mixed?")
    return answer


def _show_found(names: list[bytes], found: list[Found], as_json: bool) -> None:
    if as_json:
        data = [
            {
                "hash": name.hex(),
                "holders": [
                    {**scope._asdict(), "node": holder.node, "tier": holder.tier}
                    for scope, holder in holders
                ],
            }
            for name, holders in zip(names, found, strict=True)
        ]
        typer.echo(json.dumps(data, indent=2))
        return
    for name, holders in zip(names, found, strict=True):
        typer.secho(name.hex(), bold=True)
        for scope, holder in holders:
            where = f"namespace {scope.namespace} · layout {scope.fingerprint}"
            typer.echo(f"  {holder.tier}  {holder.node}  ({where})")
        if not holders:
            typer.echo("  nobody")
