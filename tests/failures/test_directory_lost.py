"""The directory is lost and NATS is not: etcd, or the NATS server that has the KV, is killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvbm_service.adapters.etcd_server import EmbeddedEtcd, etcd_binary
from kvbm_service.adapters.nats_server import EmbeddedNats
from kvbm_service.errors import DirectoryError
from tests.failures.cluster import START_SECONDS, Cluster
from tests.patience import until

MEMBERSHIP_SECONDS = 6.0
LOOKUP_SECONDS = 2.0
SLOW_MACHINE_SECONDS = 20.0
DirectoryServer = EmbeddedNats | EmbeddedEtcd


@pytest.fixture(params=["nats", "etcd"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DirectoryServer]:
    """A server that has nothing but the directory."""
    kind: Callable[..., DirectoryServer] = EmbeddedNats
    if request.param == "etcd":
        kind = EmbeddedEtcd
        try:
            etcd_binary()
        except DirectoryError as error:
            pytest.skip(str(error))
    with kind(store_dir=tmp_path / "directory") as server:
        yield server


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_known_peers_stay_usable_until_their_lease_ends_and_nobody_new_is_learned(
    nats: EmbeddedNats, directory: DirectoryServer, tmp_path: Path
) -> None:
    with ExitStack() as ending:
        cluster = Cluster(
            ending,
            tmp_path,
            nats_url=nats.url,
            directory_url=directory.url,
            membership_seconds=MEMBERSHIP_SECONDS,
            lookup_deadline_seconds=LOOKUP_SECONDS,
        )
        cluster.start_registry(
            {
                "KVBM_NATS_URL": nats.url,
                "KVBM_DIRECTORY_URL": directory.url,
                "KVBM_MEMBERSHIP_SECONDS": str(MEMBERSHIP_SECONDS),
            }
        )
        owner, reader = cluster.start_node("owner"), cluster.start_node("reader")
        cluster.wait_until_shared(reader, owner, START_SECONDS)
        kept = cluster.new_chain()
        assert reader.ask(kept).right

        directory.kill()
        assert cluster.reads(reader, owner), "a known peer is usable"
        until(
            lambda: not cluster.reads(reader, owner),
            "it is not used for ever",
            2 * MEMBERSHIP_SECONDS + SLOW_MACHINE_SECONDS,
        )
        newcomer = cluster.start_node("newcomer")
        assert not cluster.reads(reader, newcomer)
        answer = reader.ask(kept)
        assert (answer.right, answer.host) == (True, len(kept)), "the own tiers go on"
        assert answer.seconds < LOOKUP_SECONDS + SLOW_MACHINE_SECONDS
        assert "in the directory" in owner.log.read_text(), "the log says what is wrong"

        directory.start()
        cluster.wait_until_shared(reader, owner, 2 * MEMBERSHIP_SECONDS + SLOW_MACHINE_SECONDS)
        cluster.wait_until_shared(owner, newcomer, 2 * MEMBERSHIP_SECONDS + SLOW_MACHINE_SECONDS)
        for node in (owner, reader, newcomer):
            until(lambda node=node: not node.look().leases, "no lease is left")  # type: ignore[misc]
