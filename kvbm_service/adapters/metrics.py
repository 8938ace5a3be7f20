"""What a leader's accounts add up to, in the form that Prometheus reads.

The core leaves accounts, the shell hands them to `Metrics`, which keeps plain numbers behind
one lock: adding to them takes about a microsecond of the engine's thread. Prometheus' objects
are made only when someone asks. What changes by itself (how full tiers are, what was evicted)
is not pushed here but read at that time.

The eight names that the guides give are spelled as there. Each block that reaches the device
is counted once, by the hop that brought it there: one that was fetched from disk into host
memory ahead of its load counts as `kvbm_onboard_blocks_h2d` when it is loaded, and the fetch
shows only in `kvbm_transferred_blocks_total{path="disk_to_host"}`. Only blocks that arrived on
every rank count, in all of them.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    UnknownMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from kvbm_schemas.block import Tier
from kvbm_schemas.records import TierStatus
from kvbm_service.core.accounts import Account, Looked, Path, Refusal, Transferred

WINDOW_REQUESTS = 1000
"""Requests that the hit rates look back on, unless told otherwise."""

BYTES_BUCKETS = tuple(float(1024 * 4**power) for power in range(15))
"""1 KiB to 256 GiB, in steps of 4."""

SECONDS_BUCKETS = tuple(float(f"{digit}e{power}") for power in range(-5, 2) for digit in (1, 2, 5))[
    :-2
]
"""10 µs to 10 s, three per decade."""

GUIDES_COUNTERS = {
    Path.DEVICE_TO_HOST: ("kvbm_offload_blocks_d2h", "Blocks offloaded from device to host"),
    Path.HOST_TO_DISK: ("kvbm_offload_blocks_h2d", "Blocks offloaded from host to disk"),
    Path.DEVICE_TO_DISK: (
        "kvbm_offload_blocks_d2d",
        "Blocks offloaded from device to disk, bypassing host memory",
    ),
    Path.DISK_TO_DEVICE: (
        "kvbm_onboard_blocks_d2d",
        "Blocks onboarded from disk to device",
    ),
    Path.HOST_TO_DEVICE: (
        "kvbm_onboard_blocks_h2d",
        "Blocks onboarded from host to device, those fetched into host memory before included",
    ),
}
MATCHED_TOKENS = "kvbm_matched_tokens"

Vocabulary = tuple[tuple[str, tuple[str, ...]], ...]
"""Values of the label `reason`, each with words by which a reason's text is known.

Texts are for people and may name anything; labels must be few. The first that fits counts,
and what fits none is `other`.
"""

FAILURES: Vocabulary = (
    ("checksum", ("checksum", "something else", "not what", "corrupt", "torn")),
    ("no_space", ("no space", "enospc", "disk is full", "quota")),
    ("lost", ("the disk fail", "the disk has not", "given up", "lost", "read-only")),
    ("timeout", ("too long", "timed out", "timeout", "deadline", "in time")),
    ("unreachable", ("connect", "is gone", "not in this process", "unreachable", "no answer")),
    ("internal", ("internal error",)),
    ("io_error", ("input/output", "i/o", "errno", "device failed", "driver refused")),
)
"""Why blocks did not arrive."""

REFUSALS: Vocabulary = (
    ("filter", ("filter", "frequency", "seldom")),
    ("priority", ("priority",)),
    ("not_ready", ("not ready",)),
    ("not_here", ("not here",)),
    ("busy", ("too many questions", "busy", "under way", "at once")),
    ("no_room", ("too many blocks", "no room", "full", "in use", "budget", "capacity")),
)
"""Why blocks were not kept or lent."""

OTHER = "other"


class HitRates(NamedTuple):
    """Shares of the blocks that the window's requests wanted, by where they were found."""

    host: float
    disk: float
    remote: float


class Metrics(Collector):
    """One engine's metrics. Any thread may add to them and any may read them."""

    def __init__(self, block_tokens: int, window_requests: int = WINDOW_REQUESTS) -> None:
        self._block_tokens = block_tokens
        self._lock = threading.Lock()
        self._ways = {path: _Way() for path in Path}
        self._failed = {path: dict.fromkeys(_labels(FAILURES), 0) for path in Path}
        self._refused = dict.fromkeys(_labels(REFUSALS), 0)
        self._window = _Window(window_requests)
        self._requests = 0
        self._wanted = self._host = self._disk = self._remote = 0
        self._answered = _Histogram(SECONDS_BUCKETS)
        self._unanswered = _Histogram(SECONDS_BUCKETS)
        self._disk_works: bool | None = None
        self._read_tiers: Callable[[], Sequence[TierStatus]] = tuple
        self._read_evicted: Callable[[], Mapping[Tier, int]] = dict
        self._read_rejected: Callable[[], int] = int

    # -- feeding -----------------------------------------------------------------------------

    def account(self, entry: Account) -> None:
        """Add what the core has told. Takes about a microsecond."""
        with self._lock:
            match entry:
                case Transferred():
                    self._transferred(entry)
                case Looked():
                    self._looked(entry)
                case Refusal():
                    self._refused[refusal_label(entry.reason)] += entry.blocks

    def lookup(self, seconds: float, answered: bool) -> None:
        """The registry was asked where blocks are, and did or did not answer in time."""
        with self._lock:
            (self._answered if answered else self._unanswered).add(seconds)

    def disk_works(self, works: bool) -> None:
        """There is a disk tier; or it was given up."""
        self._disk_works = works

    def watch_tiers(
        self,
        read: Callable[[], Sequence[TierStatus]],
        read_evicted: Callable[[], Mapping[Tier, int]] = dict,
    ) -> None:
        """Ask `read` how full the tiers are, and `read_evicted` how many blocks each has evicted
        so far, whenever someone wants the metrics. Called on a thread of their own.
        """
        self._read_tiers, self._read_evicted = read, read_evicted

    def watch_rejected(self, read: Callable[[], int]) -> None:
        """Ask `read` how many messages made no sense so far, like `watch_tiers`."""
        self._read_rejected = read

    def hit_rates(self) -> HitRates:
        """The shares of the last requests' blocks that were found, by tier; 0 before any."""
        with self._lock:
            return self._window.rates()

    def _transferred(self, entry: Transferred) -> None:
        if entry.blocks:
            self._ways[entry.path].add(entry)
        if entry.failed:
            self._failed[entry.path][failure_label(entry.reason)] += entry.failed

    def _looked(self, entry: Looked) -> None:
        self._requests += 1
        self._wanted += entry.wanted
        self._host += entry.host
        self._disk += entry.disk
        self._remote += entry.remote
        if entry.wanted:
            self._window.add(entry)

    # -- reading -----------------------------------------------------------------------------

    def expose(self, accept: str = "") -> tuple[str, bytes]:
        """Everything as text, in the format that an HTTP `Accept` header asks for.

        Returns the content type and the text. OpenMetrics insists that counters end in
        `_total`, which the guides' do not: there they are of unknown type, as it demands.
        """
        encode, content_type = choose_encoder(accept)
        text = encode(self)
        for name in (MATCHED_TOKENS, *(name for name, _ in GUIDES_COUNTERS.values())):
            line = f"# TYPE {name} "
            text = text.replace(f"{line}untyped\n".encode(), f"{line}counter\n".encode())
        return content_type, text

    def collect(self) -> Iterator[Metric]:
        """Every metric as it is now, for Prometheus' client."""
        yield from self._guides()
        yield from self._hits()
        yield from self._transfers()
        yield from self._losses()
        yield from self._tiers()

    def _guides(self) -> Iterator[Metric]:
        with self._lock:
            found = self._host + self._disk + self._remote
            blocks = {path: self._ways[path].blocks for path in GUIDES_COUNTERS}
            rates = self._window.rates()
        yield UnknownMetricFamily(
            MATCHED_TOKENS,
            "Tokens of requests whose blocks were found on this node or another",
            found * self._block_tokens,
        )
        for path, (name, says) in GUIDES_COUNTERS.items():
            yield UnknownMetricFamily(name, says, blocks[path])
        for tier, rate in rates._asdict().items():
            where = "on other nodes" if tier == "remote" else f"in the {tier} tier"
            yield GaugeMetricFamily(
                f"kvbm_{tier}_cache_hit_rate",
                f"Share of the last requests' blocks that was found {where} (0.0-1.0)",
                rate,
            )

    def _hits(self) -> Iterator[Metric]:
        with self._lock:
            found = {"host": self._host, "disk": self._disk, "remote": self._remote}
            requests, wanted = self._requests, self._wanted
            lookups = {"yes": self._answered.read(), "no": self._unanswered.read()}
        yield _counter("kvbm_lookups", "Requests that were looked up", requests)
        yield _counter("kvbm_wanted_blocks", "Blocks that requests wanted", wanted)
        yield _counters(
            "kvbm_hit_blocks",
            "Blocks that were found, by where",
            ("source",),
            (((source,), blocks) for source, blocks in found.items()),
        )
        yield _histograms(
            "kvbm_lookup_seconds",
            "How long the registry took to say where blocks are, and whether it did",
            "answered",
            lookups,
            SECONDS_BUCKETS,
        )

    def _transfers(self) -> Iterator[Metric]:
        with self._lock:
            blocks = {path: way.blocks for path, way in self._ways.items()}
            sizes = {_label(path): way.bytes.read() for path, way in self._ways.items()}
            times = {_label(path): way.seconds.read() for path, way in self._ways.items()}
        yield _counters(
            "kvbm_transferred_blocks",
            "Blocks that arrived, by path",
            ("path",),
            (((_label(path),), count) for path, count in blocks.items()),
        )
        yield _histograms(
            "kvbm_transfer_bytes",
            "Bytes that arrived over all ranks, per transfer",
            "path",
            sizes,
            BYTES_BUCKETS,
        )
        yield _histograms(
            "kvbm_transfer_seconds",
            "Time that the slowest rank took, per transfer",
            "path",
            times,
            SECONDS_BUCKETS,
        )

    def _losses(self) -> Iterator[Metric]:
        with self._lock:
            failed = {path: reasons.copy() for path, reasons in self._failed.items()}
            refused = self._refused.copy()
        yield _counters(
            "kvbm_failed_blocks",
            "Blocks that did not arrive, by path and reason",
            ("path", "reason"),
            (
                ((_label(path), reason), blocks)
                for path, reasons in failed.items()
                for reason, blocks in reasons.items()
            ),
        )
        yield _counters(
            "kvbm_refused_blocks",
            "Blocks that were not kept or lent, by reason; `filter` is the offload filter",
            ("reason",),
            (((reason,), blocks) for reason, blocks in refused.items()),
        )

        yield _counter(
            "kvbm_rejected_messages",
            "Messages over NATS that were not what their subject carries, or out of bounds",
            self._read_rejected(),
        )

    def _tiers(self) -> Iterator[Metric]:
        status = {_label(one.tier): one for one in self._read_tiers()}
        evicted = {_label(tier): blocks for tier, blocks in self._read_evicted().items()}
        for what, says, values in (
            ("capacity", "that fit", {tier: one.capacity for tier, one in status.items()}),
            ("used", "that are not free", {tier: one.used for tier, one in status.items()}),
            ("pinned", "that are being read", {tier: one.pinned for tier, one in status.items()}),
        ):
            gauge = GaugeMetricFamily(
                f"kvbm_tier_{what}_blocks", f"Blocks of a tier {says}", labels=["tier"]
            )
            for tier, value in values.items():
                gauge.add_metric([tier], value)
            yield gauge
        yield _counters(
            "kvbm_evicted_blocks",
            "Blocks that had to make room, by tier",
            ("tier",),
            (((tier,), blocks) for tier, blocks in evicted.items()),
        )
        if self._disk_works is not None:
            yield GaugeMetricFamily(
                "kvbm_disk_works", "1: the disk tier works; 0: it was given up", self._disk_works
            )


@lru_cache(maxsize=256)
def failure_label(reason: str) -> str:
    """The word in `FAILURES` for this reason."""
    return _label_in(FAILURES, reason)


@lru_cache(maxsize=256)
def refusal_label(reason: str) -> str:
    """The word in `REFUSALS` for this reason."""
    return _label_in(REFUSALS, reason)


def _label_in(vocabulary: Vocabulary, reason: str) -> str:
    text = reason.lower()
    fitting = (label for label, words in vocabulary if any(word in text for word in words))
    return next(fitting, OTHER)


def _labels(vocabulary: Vocabulary) -> list[str]:
    return [*(label for label, _ in vocabulary), OTHER]


class _Histogram:
    """How many values fell between which bounds, and their sum."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def read(self) -> tuple[list[int], float]:
        return self._counts.copy(), self._sum


class _Way:
    """What has gone along one path."""

    __slots__ = ("blocks", "bytes", "seconds")

    def __init__(self) -> None:
        self.blocks = 0
        self.bytes = _Histogram(BYTES_BUCKETS)
        self.seconds = _Histogram(SECONDS_BUCKETS)

    def add(self, entry: Transferred) -> None:
        self.blocks += entry.blocks
        self.bytes.add(entry.bytes)
        self.seconds.add(entry.seconds)


class _Window:
    """The last requests that wanted blocks, and their sums."""

    def __init__(self, requests: int) -> None:
        self._last: deque[Looked] = deque(maxlen=max(1, requests))
        self._wanted = self._host = self._disk = self._remote = 0

    def add(self, entry: Looked) -> None:
        if len(self._last) == self._last.maxlen:
            self._sum_up(self._last[0], -1)
        self._last.append(entry)
        self._sum_up(entry, 1)

    def _sum_up(self, entry: Looked, sign: int) -> None:
        self._wanted += sign * entry.wanted
        self._host += sign * entry.host
        self._disk += sign * entry.disk
        self._remote += sign * entry.remote

    def rates(self) -> HitRates:
        wanted = self._wanted or 1
        return HitRates(self._host / wanted, self._disk / wanted, self._remote / wanted)


def _label(of: Path | Tier) -> str:
    """The value of a label `path` or `tier`: device_to_host, host."""
    return of.name.lower()


def _counter(name: str, says: str, value: float) -> Metric:
    return CounterMetricFamily(name, says, value)


def _counters(
    name: str,
    says: str,
    labels: Sequence[str],
    values: Iterable[tuple[Sequence[str], float]],
) -> Metric:
    family = CounterMetricFamily(name, says, labels=labels)
    for of, value in values:
        family.add_metric(of, value)
    return family


def _histograms(
    name: str,
    says: str,
    label: str,
    values: Mapping[str, tuple[list[int], float]],
    bounds: tuple[float, ...],
) -> Metric:
    family = HistogramMetricFamily(name, says, labels=[label])
    bucket_names = [*map(str, bounds), "+Inf"]
    for value, (counts, total) in values.items():
        buckets = list(zip(bucket_names, accumulate(counts), strict=True))
        family.add_metric([value], buckets, sum_value=total)
    return family
