"""Settings: read once, into one frozen struct; a value that is not allowed is refused.

Each setting is declared once, as a field of `Settings`: its type, its default, the name it
has in the environment, what it may be and what it means. All else follows from that table.

The engine's `kv_connector_extra_config` wins over the environment, which wins over the
default. Its keys are the environment's names, or the names of the fields. An empty
environment variable counts as unset.
"""

from __future__ import annotations

import difflib
import enum
import functools
import logging
import math
import os
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self
from urllib.parse import SplitResult, urlsplit

import msgspec

from kvbm_schemas.codec import Wire
from kvbm_schemas.subjects import REGISTRY_NODE, is_token
from kvbm_service.errors import SettingError

_log = logging.getLogger(__name__)

BYTES_PER_GB = 1_000_000_000
"""The guides' gigabytes are decimal."""

MAX_SLOTS = (1 << 32) - 1
"""Slot numbers are 32 bits wide on the wire."""

OUR_PREFIXES = ("KVBM_", "DYN_KVBM_")
"""A variable that begins so is meant for us: an unknown one is a typo."""

_MASK = "****"


class Kind(NamedTuple):
    """What a value may be: in words, and as a parser raising ValueError or TypeError."""

    allowed: str
    parse: Callable[[object], Any]
    show: Callable[[Any], str | float | bool] = lambda value: value
    """The parsed value as it may be printed: in the unit it was given in, secrets masked."""


class Setting(NamedTuple):
    """How a field of `Settings` is spelled, checked and explained."""

    variable: str
    kind: Kind
    meaning: str
    field_kind: Kind | None = None
    """How the value is read under the field's own name, where that is another unit."""
    option: str = ""
    """Its name on the command line, where it has one."""


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def number(least: float, most: float, unit: str, scale: float = 1.0) -> Kind:
    """A number of `unit`, fractions allowed; `scale` turns it into the field's unit."""

    def parse(value: object) -> float:
        found = _number(value)
        if not least <= found <= most:
            raise ValueError
        return found * scale

    return Kind(
        f"a number of {unit} from {_plain(least)} to {_plain(most)}",
        parse,
        lambda value: _plain(round(value / scale, 9)),
    )


def _plain(value: float) -> float:
    """The same number, without a fraction that says nothing."""
    return int(value) if value == int(value) else value


def whole(least: int, most: int, unit: str) -> Kind:
    """A whole number of `unit`."""

    def parse(value: object) -> int:
        found = int(value) if isinstance(value, str) else _number(value)
        if found != int(found) or not least <= found <= most:
            raise ValueError
        return int(found)

    return Kind(f"a whole number of {unit} from {least} to {most}", parse)


_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True}
_BOOLEANS |= {"0": False, "false": False, "no": False, "off": False}


def _parse_boolean(value: object) -> bool:
    try:
        return _BOOLEANS[str(value).strip().lower()]
    except KeyError:
        raise ValueError from None


BOOLEAN = Kind("1, true, yes or on; 0, false, no or off", _parse_boolean)


def one_of(values: type[enum.StrEnum]) -> Kind:
    """One of the words of an enumeration, in any case."""
    return Kind(" or ".join(values), lambda value: values(str(value).strip().lower()), str)


def _parse_token(value: object) -> str:
    if not isinstance(value, str) or not is_token(value):
        raise ValueError
    return value


def _parse_node_name(value: object) -> str:
    if value == "":
        return ""
    name = _parse_token(value)
    if name == REGISTRY_NODE:
        raise ValueError
    return name


_TOKEN_WORDS = "1 to 64 letters, digits, - or _"
TOKEN = Kind(_TOKEN_WORDS, _parse_token)
NODE_NAME = Kind(f"{_TOKEN_WORDS}; not {REGISTRY_NODE!r}, which is reserved", _parse_node_name)

_SCHEMES = ("nats", "tls", "ws", "wss")


def _url_parts(url: str) -> SplitResult:
    """Take one server's URL apart; raises ValueError when it cannot be one."""
    if any(character.isspace() for character in url):
        raise ValueError
    parts = urlsplit(url if "://" in url else f"nats://{url}")
    if parts.scheme not in _SCHEMES or not parts.hostname:
        raise ValueError
    if parts.port == 0 or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError
    return parts


def _parse_urls(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    urls = [url.strip() for url in value.split(",") if url.strip()]
    if not urls:
        raise ValueError
    return ",".join(_url_parts(url).geturl() for url in urls)


def mask_urls(urls: str) -> str:
    """The same URLs with passwords and tokens hidden."""
    return ",".join(_mask_url(url) for url in urls.split(","))


def _mask_url(url: str) -> str:
    login, at, server = url.rpartition("@")
    scheme, separator, user = login.rpartition("://")
    name, colon, _ = user.partition(":")
    # A user without a password is a NATS token, which is a secret as well.
    return f"{scheme}{separator}{name + colon if colon else ''}{_MASK}@{server}" if at else url


URLS = Kind(
    "nats://host:port (or tls://, ws://, wss://), several joined by commas", _parse_urls, mask_urls
)


def _parse_file(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    try:
        path = Path(value).expanduser()
    except RuntimeError:  # "~name", and nobody is called so
        raise ValueError from None
    if value and not (path.is_file() and os.access(path, os.R_OK)):
        raise ValueError
    return str(path.absolute()) if value else ""


CREDENTIALS = Kind("the path of a .creds file (or nkey seed) that can be read", _parse_file)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an operator can choose. Make one with `Settings.load`."""

    cpu_cache_gb: Annotated[
        float,
        Setting(
            "DYN_KVBM_CPU_CACHE_GB",
            number(0, 1_000_000, "GB"),
            "Size of the host tier (G2), in decimal GB, over all ranks together.",
        ),
    ] = 0.0
    cpu_cache_override_num_blocks: Annotated[
        int,
        Setting(
            "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS",
            whole(0, MAX_SLOTS, "blocks"),
            "Size of the host tier (G2), in blocks. Above 0, it wins over the GB.",
        ),
    ] = 0
    leader_worker_init_timeout_seconds: Annotated[
        float,
        Setting(
            "DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS",
            number(0.1, 86_400, "seconds"),
            "How long the leader waits at start for all of its ranks.",
        ),
    ] = 1800.0
    nats_url: Annotated[
        str,
        Setting(
            "KVBM_NATS_URL",
            URLS,
            "The NATS server, or several joined by commas.",
            option="--nats-url",
        ),
    ] = "nats://127.0.0.1:4222"
    nats_credentials: Annotated[
        str,
        Setting(
            "KVBM_NATS_CREDENTIALS",
            CREDENTIALS,
            "A .creds file to log in to NATS with; user:password go into the URL.",
            option="--credentials",
        ),
    ] = ""
    namespace: Annotated[
        str,
        Setting(
            "KVBM_NAMESPACE",
            TOKEN,
            "Nodes share blocks within one namespace only.",
            option="--namespace",
        ),
    ] = "default"
    node_name: Annotated[
        str,
        Setting(
            "KVBM_NODE_NAME",
            NODE_NAME,
            "This node's name. Unset: the host's name and a random suffix.",
        ),
    ] = ""
    lookup_deadline_seconds: Annotated[
        float,
        Setting(
            "KVBM_LOOKUP_DEADLINE_MS",
            number(0, 10_000, "milliseconds", scale=0.001),
            "How long a prompt waits to hear where its blocks are. 0: other nodes are not asked.",
            field_kind=number(0, 10, "seconds"),
        ),
    ] = 0.02
    wire: Annotated[
        Wire,
        Setting(
            "KVBM_WIRE",
            one_of(Wire),
            "How this node writes its messages; every node reads both.",
        ),
    ] = Wire.MSGPACK
    lease_seconds: Annotated[
        float,
        Setting(
            "KVBM_LEASE_SECONDS",
            number(0.1, 3600, "seconds"),
            "How long blocks stay pinned for a reader that says nothing more.",
        ),
    ] = 30.0
    membership_seconds: Annotated[
        float,
        Setting(
            "KVBM_MEMBERSHIP_SECONDS",
            number(0.5, 3600, "seconds"),
            "After how long a silent node counts as gone.",
        ),
    ] = 10.0
    verify: Annotated[
        bool,
        Setting("KVBM_VERIFY", BOOLEAN, "Checksum every block at both ends of every copy (slow)."),
    ] = False
    transfer_timeout_seconds: Annotated[
        float,
        Setting(
            "KVBM_TRANSFER_TIMEOUT_SECONDS",
            number(0.01, 3600, "seconds"),
            "How long one read from another node may take; after that the engine recomputes.",
        ),
    ] = 10.0

    @classmethod
    def load(cls, environ: Mapping[str, str], extra: Mapping[str, object] | None = None) -> Self:
        """Read the settings, and log once what is probably a mistake.

        `extra` is the engine's `kv_connector_extra_config`.

        Raises:
            SettingError: a value is not allowed, or `extra` has an unknown key.
        """
        resolved = resolve(
            [Layer(Source.ENVIRONMENT, environ), Layer(Source.CONNECTOR, extra or {})]
        )
        for notice in resolved.notices:
            _warn_once(notice)
        return typing.cast(Self, resolved.settings)

    def __repr__(self) -> str:
        shown = (
            f"{field}={(setting.field_kind or setting.kind).show(getattr(self, field))!r}"
            for field, setting in TABLE.items()
        )
        return f"Settings({', '.join(shown)})"


def _read_table() -> dict[str, Setting]:
    hints = typing.get_type_hints(Settings, include_extras=True)
    return {name: hints[name].__metadata__[0] for name in Settings.__struct_fields__}


TABLE: Mapping[str, Setting] = _read_table()
"""Every setting by the name of its field."""

_FIELDS = {setting.variable: field for field, setting in TABLE.items()}
_OPTIONS = {setting.option: field for field, setting in TABLE.items() if setting.option}

NOT_USED_YET: Mapping[str, str] = {
    "DYN_KVBM_DISK_CACHE_GB": "size of the disk tier, in GB",
    "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS": "size of the disk tier, in blocks",
    "DYN_KVBM_DISK_CACHE_DIR": "directory of the disk tier",
    "DYN_KVBM_DISK_ALLOCATOR_TYPE": "how the disk tier's file is opened",
    "DYN_KVBM_DISK_DISABLE_O_DIRECT": "disk tier without O_DIRECT",
    "DYN_KVBM_DISK_ZEROFILL_FALLBACK": "fill the disk tier's file where fallocate is missing",
    "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": "offload every block to disk",
    "DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY": "least priority of a block to offload",
    "DYN_KVBM_MAX_CONCURRENT_TRANSFERS": "offload transfers at a time",
    "DYN_KVBM_MAX_TRANSFER_BATCH_SIZE": "blocks per offload transfer",
    "DYN_KVBM_TRANSFER_BATCH_SIZE": "blocks per transfer",
    "DYN_KVBM_LEADER_ZMQ_HOST": "where the leader listened; ranks meet through NATS here",
    "DYN_KVBM_LEADER_ZMQ_PUB_PORT": "the leader's port; ranks meet through NATS here",
    "DYN_KVBM_LEADER_ZMQ_ACK_PORT": "the leader's port; ranks meet through NATS here",
    "DYN_KVBM_METRICS": "serve metrics",
    "DYN_KVBM_METRICS_PORT": "port of the metrics",
    "DYN_KVBM_CACHE_STATS_MAX_REQUESTS": "requests in the hit rate's window",
    "DYN_KVBM_CACHE_STATS_LOG_INTERVAL_SECS": "seconds between logged hit rates",
    "DYN_KVBM_ENABLE_RECORD": "record the connector's calls",
    "DYN_KVBM_NCCL_MLA_MODE": "load replicated KV once and broadcast it",
    "DYN_KVBM_NCCL_MAX_CTAS": "limit of that broadcast",
    "DYN_KVBM_DISABLE_WRITE_COMBINED": "host memory without write combining",
    "DYN_KVBM_ENABLE_NUMA": "host memory near the device",
    "DYN_KVBM_KV_EVENTS_ENABLE_CONSOLIDATOR": "merge the engine's KV events with ours",
    "DYN_KVBM_KV_EVENTS_CONSOLIDATOR_MODE": "how KV events are merged",
    "DYN_KVBM_TRTLLM_ZMQ_PORT": "port of TensorRT-LLM's KV events",
    "DYN_KVBM_OBJECT_ENABLED": "object storage tier",
    "DYN_KVBM_OBJECT_BUCKET": "object storage tier",
    "DYN_KVBM_OBJECT_ENDPOINT": "object storage tier",
    "DYN_KVBM_OBJECT_REGION": "object storage tier",
    "DYN_KVBM_OBJECT_ACCESS_KEY": "object storage tier",
    "DYN_KVBM_OBJECT_SECRET_KEY": "object storage tier",
    "DYN_KVBM_OBJECT_NUM_BLOCKS": "object storage tier",
}
"""Variables that people bring along from Dynamo's KVBM, and that change nothing here yet."""

_NOT_USED_YET_PREFIX = re.compile(r"DYN_KVBM_NIXL_BACKEND_\w+")


def is_not_used_yet(variable: str) -> bool:
    """Whether this is a name of the guides that this version does not read."""
    return variable in NOT_USED_YET or _NOT_USED_YET_PREFIX.fullmatch(variable) is not None


class Source(enum.StrEnum):
    """Where a value came from."""

    DEFAULT = "default"
    ENVIRONMENT = "environment"
    CONNECTOR = "connector config"
    COMMAND_LINE = "command line"


class Layer(NamedTuple):
    """Values from one source. Later layers win over earlier ones."""

    source: Source
    values: Mapping[str, object]


class Resolved(NamedTuple):
    """Settings, the source of each by its field, and what the operator should hear."""

    settings: Settings
    sources: Mapping[str, Source]
    unused: tuple[str, ...]
    """Names given that this version does not use yet."""
    unknown: Mapping[str, str]
    """Variables that look like ours and are not, each with the nearest name we know."""

    @property
    def notices(self) -> list[str]:
        """One line for each thing that is probably not what the operator meant."""
        unused = [f"{name} is set, but not used yet in this version" for name in self.unused]
        unknown = [
            f"{name} is not a setting of ours and is ignored; did you mean {nearest}?"
            for name, nearest in self.unknown.items()
        ]
        return unused + unknown


def resolve(layers: Sequence[Layer]) -> Resolved:
    """Put the layers on top of each other.

    Raises:
        SettingError: a value is not allowed; a layer other than the environment has an
            unknown key, or has one setting under two names.
    """
    values: dict[str, Any] = {}
    sources = dict.fromkeys(TABLE, Source.DEFAULT)
    unused: list[str] = []
    unknown: dict[str, str] = {}
    for layer in layers:
        given: dict[str, str] = {}
        for key, value in layer.values.items():
            field = _field_of(key, layer.source)
            if field is not None and value != "" and value is not None:
                if field in given:
                    raise SettingError(key, _masked(value), f"{given[field]} says it already")
                given[field] = key
                values[field] = _parsed(field, key, value)
                sources[field] = layer.source
            elif field is None and is_not_used_yet(key):
                unused.append(key)
            elif field is None and layer.source is not Source.ENVIRONMENT:
                raise SettingError(key, _masked(value), f"unknown key; nearest is {nearest(key)}")
            elif field is None and key.startswith(OUR_PREFIXES):
                unknown[key] = nearest(key)
    return Resolved(Settings(**values), sources, tuple(sorted(set(unused))), unknown)


def _field_of(key: str, source: Source) -> str | None:
    """The field that `key` names. Each source has its own names."""
    if source is Source.COMMAND_LINE:
        return _OPTIONS.get(key)
    if key in _FIELDS:
        return _FIELDS[key]
    return key if source is Source.CONNECTOR and key in TABLE else None


def _parsed(field: str, key: str, value: object) -> object:
    setting = TABLE[field]
    kind = (key == field and setting.field_kind) or setting.kind
    try:
        return kind.parse(value)
    except (ValueError, TypeError, OverflowError):
        raise SettingError(key, _masked(value), kind.allowed) from None


def nearest(name: str) -> str:
    """The name we know that is most like `name`."""
    names = [*_FIELDS, *NOT_USED_YET, *TABLE]
    same_case = [known for known in names if known.isupper() == name.isupper()]
    return difflib.get_close_matches(name, same_case, n=1, cutoff=0.0)[0]


def _masked(value: object) -> object:
    """A refused value as it may be shown: not knowing its parts, hide all that may be a login."""
    if not isinstance(value, str) or "@" not in value:
        return value
    return f"{_MASK}@{value.rpartition('@')[2]}"


@functools.lru_cache(maxsize=256)
def _warn_once(notice: str) -> None:
    _log.warning(notice)


def host_slots(settings: Settings, block_bytes_all_ranks: int) -> int:
    """How many blocks the host tier holds, given the bytes of one block over all ranks.

    Raises:
        SettingError: the tier has no size, or no block fits into it, or too many do.
    """
    assert block_bytes_all_ranks > 0
    by_bytes = TABLE["cpu_cache_gb"].variable
    by_blocks = TABLE["cpu_cache_override_num_blocks"].variable
    if settings.cpu_cache_override_num_blocks > 0:
        return settings.cpu_cache_override_num_blocks
    gb = settings.cpu_cache_gb
    if gb == 0:
        raise SettingError(
            by_bytes, gb, f"the host tier has no size; set {by_bytes} or {by_blocks}"
        )
    slots = int(round(gb * BYTES_PER_GB) // block_bytes_all_ranks)
    if slots == 0:
        least = math.ceil(block_bytes_all_ranks / BYTES_PER_GB * 1e4) / 1e4
        raise SettingError(
            by_bytes,
            gb,
            f"one block takes {block_bytes_all_ranks} bytes over all ranks; "
            f"set at least {least:g}, or {by_blocks}",
        )
    if slots > MAX_SLOTS:
        raise SettingError(
            by_bytes, gb, f"that is {slots} blocks; at most {MAX_SLOTS} are possible"
        )
    return slots
