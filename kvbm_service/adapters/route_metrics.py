"""What `kvbm route` has done, in the form that Prometheus reads."""

from __future__ import annotations

import contextlib
import enum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BLOCKS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Outcome(enum.StrEnum):
    """How a request at an engine ended."""

    ANSWERED = "answered"
    REFUSED = "refused"
    """By the engine, with an error of its own."""
    LOST = "lost"
    """With the engine, or its connection."""
    CANCELLED = "cancelled"
    """By the client, who went away."""


class RouteMetrics:
    """One router's counters. Engines are called by their URLs."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "kvbm_route_requests",
            "Requests sent to engines, by how they ended",
            ("engine", "role", "outcome"),
            registry=self._registry,
        )
        self.retries = Counter(
            "kvbm_route_retries",
            "Requests that were sent to another engine, or again",
            registry=self._registry,
        )
        self.rejected = Counter(
            "kvbm_route_rejected",
            "Requests turned away: no engine, or too many requests",
            ("reason",),
            registry=self._registry,
        )
        self.prefills = Counter(
            "kvbm_route_prefills",
            "Prompts for decode engines: computed at a prefill engine, or not, and why",
            ("outcome",),
            registry=self._registry,
        )
        self.prefix_blocks = Histogram(
            "kvbm_route_prefix_blocks",
            "Blocks of the prompt's prefix known to be at the chosen engine",
            buckets=_BLOCKS,
            registry=self._registry,
        )
        self.first_byte_seconds = Histogram(
            "kvbm_route_first_byte_seconds",
            "From a request's arrival to the first byte of its answer",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.lookup_seconds = Histogram(
            "kvbm_route_lookup_seconds",
            "How long it took to find out who has a prompt's prefix",
            buckets=(0.001, 0.0025, *_SECONDS),
            registry=self._registry,
        )
        self.in_flight = Gauge(
            "kvbm_route_in_flight",
            "Requests at engines now",
            ("engine",),
            registry=self._registry,
        )
        self.healthy = Gauge(
            "kvbm_route_engine_up",
            "1 while an engine says that it is well",
            ("engine",),
            registry=self._registry,
        )

    def forget(self, engine: str) -> None:
        """An engine is no more."""
        for gauge in (self.healthy, self.in_flight):
            with contextlib.suppress(KeyError):
                gauge.remove(engine)

    def page(self, accept: str) -> tuple[bytes, str]:
        """Everything, and its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type
