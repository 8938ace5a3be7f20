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
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Self

import msgspec

from kvbm_schemas.codec import Wire
from kvbm_service.adapters.masking import MASK
from kvbm_service.core.offload_filter import HIGHEST_FREQUENCY, MAX_ENTRIES
from kvbm_service.errors import SettingError
from kvbm_service.setting_kind import (
    ADDRESS,
    BACKEND,
    BOOLEAN,
    CREDENTIALS,
    DIRECTORY,
    DIRECTORY_OR_NONE,
    DIRECTORY_URLS,
    HTTP_URL,
    NODE_NAME,
    NOWHERE,
    PEM,
    TOKEN,
    URLS,
    Kind,
    number,
    one_of,
    whole,
)
from kvbm_service.unused_settings import NOT_USED_YET, USED_ELSEWHERE, why_unused

_log = logging.getLogger(__name__)

BYTES_PER_GB = 1_000_000_000
"""The guides' gigabytes are decimal."""

MAX_SLOTS = (1 << 32) - 1
"""Slot numbers are 32 bits wide on the wire."""

OUR_PREFIXES = ("KVBM_", "DYN_KVBM_")
"""A variable that begins so is meant for us: an unknown one is a typo."""


class Setting(NamedTuple):
    """How a field of `Settings` is spelled, checked and explained."""

    variable: str
    kind: Kind
    meaning: str
    field_kind: Kind | None = None
    """How the value is read under the field's own name, where that is another unit."""
    option: str = ""
    """Its name on the command line, where it has one."""


class DiskAllocator(enum.StrEnum):
    """The two ways in which Dynamo's KVBM opens its file."""

    DEFAULT = "default"
    OPEN_DIRECT = "open-direct"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an operator can choose. Make one with `Settings.load`."""

    cpu_cache_gb: Annotated[
        float,
        Setting(
            "DYN_KVBM_CPU_CACHE_GB",
            number(0, 1_000_000, "GB"),
            "Size of the host tier (G2), in decimal GB, over all ranks together. Make it larger "
            "than the engine's own KV pool: a smaller one holds little that the engine has lost.",
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
    host_cache_dir: Annotated[
        str,
        Setting(
            "KVBM_HOST_CACHE_DIR",
            DIRECTORY_OR_NONE,
            "Where the host tier lies as shared memory, so that a restarted engine finds its "
            f"blocks again. {NOWHERE}: private memory, which ends with the process.",
        ),
    ] = "/dev/shm"
    disk_cache_gb: Annotated[
        float,
        Setting(
            "DYN_KVBM_DISK_CACHE_GB",
            number(0, 1_000_000, "GB"),
            "Size of the disk tier (G3), in decimal GB, over all ranks together; survives "
            "restarts. Make it larger than the host tier. Without a host tier the engine's "
            "blocks go to disk directly, which is experimental.",
        ),
    ] = 0.0
    disk_cache_override_num_blocks: Annotated[
        int,
        Setting(
            "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS",
            whole(0, MAX_SLOTS, "blocks"),
            "Size of the disk tier (G3), in blocks. Above 0, it wins over the GB.",
        ),
    ] = 0
    disk_cache_dir: Annotated[
        str,
        Setting(
            "DYN_KVBM_DISK_CACHE_DIR",
            DIRECTORY,
            "Where the disk tier's files lie, one per rank. Choose a fast local disk; /tmp is "
            "memory on some systems.",
        ),
    ] = "/tmp"
    disk_allocator_type: Annotated[
        DiskAllocator,
        Setting(
            "DYN_KVBM_DISK_ALLOCATOR_TYPE",
            one_of(DiskAllocator),
            "Both mean the same here: the file is opened with O_DIRECT.",
        ),
    ] = DiskAllocator.DEFAULT
    disk_disable_o_direct: Annotated[
        bool,
        Setting(
            "DYN_KVBM_DISK_DISABLE_O_DIRECT",
            BOOLEAN,
            "Read and write the disk tier through the page cache, which then competes with the "
            "host tier for memory.",
        ),
    ] = False
    disk_zerofill_fallback: Annotated[
        bool,
        Setting(
            "DYN_KVBM_DISK_ZEROFILL_FALLBACK",
            BOOLEAN,
            "Where the file system has no fallocate, write zeros instead to take the disk "
            "tier's space at start (slow once).",
        ),
    ] = False
    disk_backend: Annotated[
        str,
        Setting(
            "KVBM_DISK_BACKEND",
            BACKEND,
            "The NIXL backend that reads and writes the disk tier's files.",
        ),
    ] = "POSIX"
    disable_disk_offload_filter: Annotated[
        bool,
        Setting(
            "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER",
            BOOLEAN,
            "Copy every block from host to disk, not only those in demand: more hits after a "
            "restart, and more wear on the SSD.",
        ),
    ] = False
    disk_offload_min_frequency: Annotated[
        int,
        Setting(
            "KVBM_DISK_OFFLOAD_MIN_FREQUENCY",
            whole(1, HIGHEST_FREQUENCY, ""),
            "How much in demand a block must be to go from host to disk. It starts at 1, doubles "
            "with each hit, and loses 1 at each decay step.",
        ),
    ] = 2
    disk_offload_decay_seconds: Annotated[
        float,
        Setting(
            "KVBM_DISK_OFFLOAD_DECAY_SECONDS",
            number(0.1, 2_592_000, "seconds"),
            "Time between two such decay steps.",
        ),
    ] = 600.0
    disk_offload_max_entries: Annotated[
        int,
        Setting(
            "KVBM_DISK_OFFLOAD_MAX_ENTRIES",
            whole(1, MAX_ENTRIES, "blocks"),
            "Of how many blocks the demand is remembered; beyond, the least wanted is forgotten.",
        ),
    ] = 1_000_000
    host_offload_prefix_min_priority: Annotated[
        int,
        Setting(
            "DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY",
            whole(0, 100, ""),
            "A request's blocks are kept up to the first whose priority is below this; a block "
            "without one has 0. Only engines that give blocks priorities are concerned.",
        ),
    ] = 0
    max_concurrent_transfers: Annotated[
        int,
        Setting(
            "DYN_KVBM_MAX_CONCURRENT_TRANSFERS",
            whole(1, 1024, "transfers"),
            "How many copies to and from the disk may be under way at a time, each way.",
        ),
    ] = 4
    max_transfer_batch_size: Annotated[
        int,
        Setting(
            "DYN_KVBM_MAX_TRANSFER_BATCH_SIZE",
            whole(1, 4096, "blocks"),
            "How many blocks one such copy takes at most.",
        ),
    ] = 16
    prefetch_share: Annotated[
        float,
        Setting(
            "KVBM_PREFETCH_SHARE",
            number(0, 1, ""),
            "Share of the host tier that may be used to bring up blocks of requests that still "
            "wait. 0: blocks are not brought up early.",
        ),
    ] = 0.125
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
    nats_ca: Annotated[
        str,
        Setting(
            "KVBM_NATS_CA",
            PEM,
            "Who may vouch for a NATS server with TLS. Unset: those the system trusts.",
        ),
    ] = ""
    nats_certificate: Annotated[
        str, Setting("KVBM_NATS_CERTIFICATE", PEM, "This process's own certificate for NATS.")
    ] = ""
    nats_key: Annotated[
        str, Setting("KVBM_NATS_KEY", PEM, "The private key of KVBM_NATS_CERTIFICATE.")
    ] = ""
    directory_url: Annotated[
        str,
        Setting(
            "KVBM_DIRECTORY_URL",
            DIRECTORY_URLS,
            "Where the nodes meet: etcd, or a NATS server with JetStream. Unset: KVBM_NATS_URL.",
        ),
    ] = ""
    etcd_ca: Annotated[
        str, Setting("KVBM_ETCD_CA", PEM, "Who may vouch for an etcd server with TLS (etcds://).")
    ] = ""
    etcd_certificate: Annotated[
        str, Setting("KVBM_ETCD_CERTIFICATE", PEM, "This process's own certificate for etcd.")
    ] = ""
    etcd_key: Annotated[
        str, Setting("KVBM_ETCD_KEY", PEM, "The private key of KVBM_ETCD_CERTIFICATE.")
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
    engine_url: Annotated[
        str,
        Setting(
            "KVBM_ENGINE_URL",
            HTTP_URL,
            "Where this engine serves OpenAI's interface, as `kvbm route` reaches it. Unset: "
            "nothing is routed to it.",
        ),
    ] = ""
    route_deadline_seconds: Annotated[
        float,
        Setting(
            "KVBM_ROUTE_DEADLINE_MS",
            number(0, 10_000, "milliseconds", scale=0.001),
            "How long `kvbm route` tries to find out who has a prompt's prefix. 0: it goes by "
            "load alone.",
            field_kind=number(0, 10, "seconds"),
        ),
    ] = 0.05
    lookup_deadline_seconds: Annotated[
        float,
        Setting(
            "KVBM_LOOKUP_DEADLINE_MS",
            number(0, 10_000, "milliseconds", scale=0.001),
            "How long a prompt waits to hear where its blocks are. 0: other nodes are not asked.",
            field_kind=number(0, 10, "seconds"),
        ),
    ] = 0.02
    staging_deadline_seconds: Annotated[
        float,
        Setting(
            "KVBM_STAGING_DEADLINE_MS",
            number(0, 60_000, "milliseconds", scale=0.001),
            "How much longer a prompt waits for blocks that lie on another node's disk, and how "
            "long this node takes at most to bring up those that others wait for.",
            field_kind=number(0, 60, "seconds"),
        ),
    ] = 0.2
    hand_over_deadline_seconds: Annotated[
        float,
        Setting(
            "KVBM_HAND_OVER_DEADLINE_MS",
            number(0, 60_000, "milliseconds", scale=0.001),
            "How long a decode request waits for its prefill engine to lease what it hands over "
            "(after that the prompt is computed), and how long this node takes at most to do so "
            "for others: the same on both, and longer than KVBM_STAGING_DEADLINE_MS.",
            field_kind=number(0, 60, "seconds"),
        ),
    ] = 2.0
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
    lend_device: Annotated[
        bool,
        Setting(
            "KVBM_LEND_DEVICE",
            BOOLEAN,
            "Let decode engines read handed-over blocks straight from device memory, GPU to GPU. "
            "Off: they read them through host memory.",
        ),
    ] = True
    transfer_timeout_seconds: Annotated[
        float,
        Setting(
            "KVBM_TRANSFER_TIMEOUT_SECONDS",
            number(0.01, 3600, "seconds"),
            "How long one read from another node may take; after that the engine recomputes.",
        ),
    ] = 10.0
    metrics: Annotated[
        bool,
        Setting("DYN_KVBM_METRICS", BOOLEAN, "Serve /metrics for Prometheus."),
    ] = False
    metrics_port: Annotated[
        int,
        Setting(
            "DYN_KVBM_METRICS_PORT",
            whole(0, 65_535, ""),
            "The port of /metrics; where it is taken, the next free one. 0: any free one.",
        ),
    ] = 6880
    metrics_host: Annotated[
        str,
        Setting(
            "KVBM_METRICS_HOST",
            ADDRESS,
            "The address that /metrics listens on: 0.0.0.0 is every one of this machine's, "
            "127.0.0.1 keeps others out.",
        ),
    ] = "0.0.0.0"
    cache_stats_max_requests: Annotated[
        int,
        Setting(
            "DYN_KVBM_CACHE_STATS_MAX_REQUESTS",
            whole(1, 1_000_000, "requests"),
            "Over how many of the latest requests hit rates are taken.",
        ),
    ] = 1000
    cache_stats_log_interval_seconds: Annotated[
        float,
        Setting(
            "DYN_KVBM_CACHE_STATS_LOG_INTERVAL_SECS",
            number(0, 86_400, "seconds"),
            "How often hit rates are logged, if they have changed. 0: never.",
        ),
    ] = 5.0

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

    @property
    def wants_host(self) -> bool:
        """Whether a host tier is asked for."""
        return self.cpu_cache_gb > 0 or self.cpu_cache_override_num_blocks > 0

    @property
    def wants_disk(self) -> bool:
        """Whether a disk tier is asked for."""
        return self.disk_cache_gb > 0 or self.disk_cache_override_num_blocks > 0

    @property
    def disk_only(self) -> bool:
        """Whether blocks go from the device to disk directly: the guides' third option."""
        return self.wants_disk and not self.wants_host

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
        unused = [
            f"{name} is set, but not used yet in this version: {why_unused(name)}"
            for name in self.unused
        ]
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
                    shown = _shown(TABLE[field].kind, value)
                    raise SettingError(key, shown, f"{given[field]} says it already")
                given[field] = key
                values[field] = _parsed(field, key, value)
                sources[field] = layer.source
            elif field is None and why_unused(key):
                unused.append(key)
            elif field is None and layer.source is not Source.ENVIRONMENT:
                raise SettingError(key, MASK, f"unknown key; nearest is {nearest(key)}")
            elif field is None and key.startswith(OUR_PREFIXES) and key not in USED_ELSEWHERE:
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
        raise SettingError(key, _shown(kind, value), kind.allowed) from None


def nearest(name: str) -> str:
    """The name we know that is most like `name`."""
    names = [*_FIELDS, *NOT_USED_YET, *TABLE]
    same_case = [known for known in names if known.isupper() == name.isupper()]
    return difflib.get_close_matches(name, same_case, n=1, cutoff=0.0)[0]


def _shown(kind: Kind, value: object) -> object:
    """A refused value as it may be shown."""
    return kind.show_refused(value) if isinstance(value, str) else value


@functools.lru_cache(maxsize=256)
def _warn_once(notice: str) -> None:
    _log.warning(notice)


_HOST_SIZE = "cpu_cache_gb", "cpu_cache_override_num_blocks"
_DISK_SIZE = "disk_cache_gb", "disk_cache_override_num_blocks"


class TierSlots(NamedTuple):
    """How many blocks fit into each tier; 0 if it is not asked for."""

    host: int
    disk: int


def tier_slots(settings: Settings, block_bytes_all_ranks: int) -> TierSlots:
    """How many blocks fit into the tiers asked for, given the bytes of one over all ranks.

    Raises:
        SettingError: no tier is asked for; or no block fits into one that is, or too many do.
    """
    assert block_bytes_all_ranks > 0
    if not (settings.wants_host or settings.wants_disk):
        host, host_blocks, disk, disk_blocks = (
            TABLE[field].variable for field in (*_HOST_SIZE, *_DISK_SIZE)
        )
        raise SettingError(
            host,
            settings.cpu_cache_gb,
            "the host tier has no size, and neither has the disk tier; "
            f"set {host} or {host_blocks}, or {disk} or {disk_blocks}, or one of each",
        )
    return TierSlots(
        _slots(settings, *_HOST_SIZE, block_bytes_all_ranks),
        _slots(settings, *_DISK_SIZE, block_bytes_all_ranks),
    )


def _slots(settings: Settings, gb_field: str, blocks_field: str, block_bytes: int) -> int:
    gb, blocks = getattr(settings, gb_field), getattr(settings, blocks_field)
    if blocks > 0 or gb == 0:
        return int(blocks)
    slots = int(round(gb * BYTES_PER_GB) // block_bytes)
    by_bytes = TABLE[gb_field].variable
    if slots == 0:
        least = math.ceil(block_bytes / BYTES_PER_GB * 1e4) / 1e4
        raise SettingError(
            by_bytes,
            gb,
            f"one block takes {block_bytes} bytes over all ranks; "
            f"set at least {least:g}, or {TABLE[blocks_field].variable}",
        )
    if slots > MAX_SLOTS:
        raise SettingError(
            by_bytes, gb, f"that is {slots} blocks; at most {MAX_SLOTS} are possible"
        )
    return slots
