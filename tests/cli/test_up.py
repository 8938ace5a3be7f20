"""`kvbm up`: NATS and a registry on one host, with one command, and nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from kvbm_service.adapters.nats_server import EmbeddedNats
from tests.patience import until


def url_of(up) -> str:
    """Where it says that NATS is."""
    return up.wait_for("export KVBM_NATS_URL=").partition("=")[2]


def children(pid: int) -> list[int]:
    """The processes that `pid` has started."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_starts_on_a_free_port_and_a_signal_ends_all_of_it(kvbm, start, number: int) -> None:
    up = start("up", "--port", "0")
    url = url_of(up)
    up.wait_for("registry")
    assert kvbm("ls", "--nats-url", url).stdout == b"No nodes.\n"
    servers = children(up.process.pid)
    assert len(servers) == 1
    assert up.stop(number) == 0
    assert not any(map(alive, servers))
    assert not any("Traceback" in line for line in up.seen)


def test_what_was_temporary_is_gone_when_it_ends(start, tmp_path: Path) -> None:
    up = start("up", "--port", "0", TMPDIR=str(tmp_path))
    url_of(up)
    up.wait_for("registry")
    assert list(tmp_path.iterdir())
    assert up.stop() == 0
    assert list(tmp_path.iterdir()) == []


def test_its_server_listens_on_loopback_only(start) -> None:
    up = start("up", "--port", "0")
    port = int(url_of(up).rpartition(":")[2])
    everywhere = f":{port:04X} 00000000:0000 0A"
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines():
            if everywhere in line:
                assert line.split()[1].startswith("0100007F:")
    assert up.stop() == 0


def test_a_port_in_use_is_one_line_with_the_cure(kvbm, nats: EmbeddedNats, tmp_path: Path) -> None:
    done = kvbm("up", "--port", str(nats.port), "--state-dir", str(tmp_path))
    assert done.returncode == 1
    assert done.stdout == b""
    assert done.stderr.count(b"\n") == 1
    assert f"port {nats.port}".encode() in done.stderr
    assert b"--port" in done.stderr
    assert b"--nats-url" in done.stderr


def test_the_state_stays_in_the_folder_given(start, tmp_path: Path) -> None:
    state = tmp_path / "a" / "state"
    up = start("up", "--port", "0", "--state-dir", str(state))
    url_of(up)
    up.wait_for("registry")
    assert up.stop() == 0
    assert (state / "jetstream").is_dir()


def test_without_a_folder_given_each_port_has_its_own(start, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    up = start("up", "--port", str(port), XDG_STATE_HOME=str(tmp_path))
    assert url_of(up) == f"nats://127.0.0.1:{port}"
    assert up.stop() == 0
    assert (tmp_path / "kvbm" / f"nats-{port}" / "jetstream").is_dir()


def test_a_folder_that_cannot_be_made_is_one_line(kvbm, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = kvbm("up", "--port", "0", "--state-dir", str(tmp_path / "file" / "state"))
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert b"state" in done.stderr


def test_with_a_url_it_starts_no_server(start, nats: EmbeddedNats) -> None:
    up = start("up", "--nats-url", nats.url)
    assert url_of(up) == nats.url
    up.wait_for("registry")
    assert children(up.process.pid) == []
    assert up.stop() == 0
    assert nats.pid is not None


def test_when_its_server_dies_it_says_so_and_ends(start) -> None:
    up = start("up", "--port", "0")
    url_of(up)
    up.wait_for("registry")
    (server,) = children(up.process.pid)
    os.kill(server, signal.SIGKILL)
    assert up.wait() == 1
    assert any("nats-server has ended" in line for line in up.seen)
    assert not any("Traceback" in line for line in up.seen)


def test_killed_outright_it_takes_its_server_with_it(start) -> None:
    up = start("up", "--port", "0")
    url_of(up)
    (server,) = children(up.process.pid)
    up.stop(signal.SIGKILL)
    until(lambda: not alive(server))
