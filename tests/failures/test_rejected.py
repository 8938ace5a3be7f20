"""What a node rejects can be seen: in its metrics, and once in its log."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from kvbm_schemas.codec import encode
from kvbm_schemas.requests import Resync
from kvbm_service.adapters.nats_server import EmbeddedNats
from tests.patience import until
from tests.wire.test_every_subject import NODE, SCOPE, World

MESSAGES = 5


@pytest.fixture
def world(nats: EmbeddedNats) -> Iterator[World]:
    world = World(nats.url)
    yield world
    world.close()


def test_every_message_that_makes_no_sense_is_in_the_metrics_and_the_first_in_the_log(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    assert rejected(world) == 0
    with caplog.at_level(logging.WARNING, "kvbm_service"):
        for _ in range(MESSAGES):
            world.publish(SCOPE.of(NODE, "lease"), encode(Resync()))
        until(lambda: rejected(world) == MESSAGES)
    assert caplog.text.count(f"rejected a message on {SCOPE.of(NODE, 'lease')}") == 1


def rejected(world: World) -> float:
    """As Prometheus would read it."""
    _, text = world.leader.metrics.expose()
    (line,) = [
        line for line in text.decode().splitlines()
        if line.startswith("kvbm_rejected_messages_total ")
    ]  # fmt: skip
    return float(line.split()[1])
