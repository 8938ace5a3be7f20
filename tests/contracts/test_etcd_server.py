"""The embedded etcd, in real processes. What it shares with nats-server is tested there."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import pytest

from kvbm_service.adapters import etcd_server
from kvbm_service.adapters.etcd_directory import EtcdDirectory
from kvbm_service.adapters.etcd_login import parse_login
from kvbm_service.adapters.etcd_server import EmbeddedEtcd
from kvbm_service.errors import DirectoryError, PortTaken


def listening_addresses(pid: int) -> set[str]:
    """Where a process listens, as the kernel writes addresses."""
    sockets = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it has just closed a file
            sockets.add(str(link.readlink()).removeprefix("socket:[").rstrip("]"))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in sockets:
                found.add(words[1].partition(":")[0])
    return found


def test_two_servers_on_free_ports_do_not_meet() -> None:
    with EmbeddedEtcd() as one, EmbeddedEtcd() as other:
        assert one.port > 0
        assert one.port != other.port


def test_it_listens_on_loopback_only() -> None:
    with EmbeddedEtcd() as server:
        assert server.pid is not None
        assert listening_addresses(server.pid) == {"0100007F"}


async def test_it_comes_back_on_the_same_port_with_the_same_store(tmp_path: Path) -> None:
    with EmbeddedEtcd(store_dir=tmp_path) as server:
        directory = EtcdDirectory(parse_login(server.url), lease_seconds=60.0)
        await directory.join("a.b.c", b"x")
        for end in (server.stop, server.kill):
            port = server.port
            end()
            assert server.pid is None
            server.start()
            assert server.port == port
            assert [entry.key for entry in await directory.entries()] == ["a.b.c"]
        await directory.close()


def test_a_port_in_use_is_one_clear_error_and_leaves_nothing_behind() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = EmbeddedEtcd(port)
        with pytest.raises(PortTaken, match=f"port {port} .* in use"), server:
            pass
        assert server.pid is None


def test_what_etcd_says_when_it_ends_at_once_is_quoted(tmp_path: Path) -> None:
    absent = {"cert-file": str(tmp_path / "absent"), "key-file": str(tmp_path / "absent")}
    with (
        pytest.raises(DirectoryError, match=r"ended at once: .*no such file"),
        EmbeddedEtcd(options=absent),
    ):
        pass


def test_options_for_another_etcd_in_the_environment_do_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ETCD_LISTEN_CLIENT_URLS", "http://127.0.0.1:1")
    monkeypatch.setenv("ETCD_ENABLE_NONSENSE", "very")
    with EmbeddedEtcd() as server:
        assert server.pid is not None


def test_without_a_binary_one_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(etcd_server, "UNPACKED", tmp_path)
    with (
        pytest.raises(DirectoryError, match="apt-get install etcd-server") as error,
        EmbeddedEtcd(),
    ):
        pass
    assert "\n" not in str(error.value)
