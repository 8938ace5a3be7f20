"""`kvbm up --etcd`, and commands that find the directory on etcd."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from kvbm_service.adapters.nats_server import EmbeddedNats


def urls_of(up) -> dict[str, str]:
    """What it says to export."""
    said = [up.wait_for(f"export {name}=") for name in ("KVBM_NATS_URL", "KVBM_DIRECTORY_URL")]
    return dict(line.removeprefix("  export ").split("=") for line in said)


def children(pid: int) -> dict[str, int]:
    """The processes that `pid` has started, by the names of their programs."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found[Path(f"/proc/{child}/comm").read_text().strip()] = int(child)
    return found


def test_it_runs_etcd_and_everybody_meets_there(kvbm, start, tmp_path: Path) -> None:
    up = start("up", "--port", "0", "--etcd", "--state-dir", str(tmp_path))
    urls = urls_of(up)
    assert urls["KVBM_DIRECTORY_URL"].startswith("etcd://127.0.0.1:")
    up.wait_for("registry answers")
    done = kvbm("ls", **urls)
    assert (done.stdout, done.stderr) == (b"No nodes.\n", b"")
    servers = children(up.process.pid)
    assert set(servers) == {"etcd", "nats-server"}
    assert up.stop() == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in servers.values())
    assert not any("Traceback" in line for line in up.seen)
    assert (tmp_path / "etcd" / "member").is_dir()


def test_when_its_etcd_dies_it_says_so_and_ends(start) -> None:
    up = start("up", "--port", "0", "--etcd")
    urls_of(up)
    up.wait_for("registry answers")
    os.kill(children(up.process.pid)["etcd"], signal.SIGKILL)
    assert up.wait() == 1
    assert any("etcd has ended" in line for line in up.seen)
    assert not any("Traceback" in line for line in up.seen)


def test_beside_a_nats_server_that_is_there_it_starts_none(kvbm, nats: EmbeddedNats) -> None:
    done = kvbm("up", "--etcd", "--nats-url", nats.url)
    assert done.returncode == 2
    assert b"leave out --etcd" in done.stderr


@pytest.mark.parametrize("command", [["ls"], ["locate", "0" * 32]])
def test_without_etcd_a_command_says_where_it_looked(
    kvbm, nats: EmbeddedNats, command: list[str]
) -> None:
    url = "etcd://someone:geheim@127.0.0.1:1"
    done = kvbm(*command, KVBM_NATS_URL=nats.url, KVBM_DIRECTORY_URL=url)
    assert done.returncode == 1
    assert done.stdout == b""
    assert done.stderr.count(b"\n") == 1
    assert done.stderr.startswith(b"kvbm: no answer from etcd at etcd://127.0.0.1:1: ")
    assert b"KVBM_DIRECTORY_URL" in done.stderr
    assert b"geheim" not in done.stderr


def test_a_registry_waits_for_etcd_in_the_background(
    kvbm, start, nats: EmbeddedNats, tmp_path: Path
) -> None:
    registry = start("registry", KVBM_NATS_URL=nats.url, KVBM_DIRECTORY_URL="etcd://127.0.0.1:1")
    registry.wait_for("no answer from etcd at etcd://127.0.0.1:1: nobody listens there")
    assert registry.stop() == 0
    assert not any("Traceback" in line for line in registry.seen)


def test_a_directory_on_another_nats_server_is_found_there(kvbm, nats: EmbeddedNats) -> None:
    with EmbeddedNats(jetstream=False) as events:
        urls = {"KVBM_NATS_URL": events.url, "KVBM_DIRECTORY_URL": nats.url}
        assert kvbm("ls", **urls).stdout == b"No nodes.\n"
        done = kvbm("ls", KVBM_NATS_URL=events.url)
        assert b"no JetStream" in done.stderr


def test_a_directory_on_a_nats_server_that_is_away_is_one_line(kvbm, nats: EmbeddedNats) -> None:
    done = kvbm("ls", KVBM_NATS_URL=nats.url, KVBM_DIRECTORY_URL="nats://127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert b"nats://127.0.0.1:1" in done.stderr
