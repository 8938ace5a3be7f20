from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kvbm_service.adapters.nats_bus import NatsBus
from kvbm_service.adapters.nats_server import PING_SECONDS, PINGS_UNANSWERED, EmbeddedNats
from kvbm_service.errors import BusError, PortTaken


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def listening_addresses(port: int) -> list[str]:
    """The addresses (hexadecimal, reversed) on which someone listens on `port`."""
    listening = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            address, _, number = line.split()[1].partition(":")
            if line.split()[3] == "0A" and int(number, 16) == port:
                listening.append(address)
    return listening


def await_end(pid: int) -> None:
    deadline = time.monotonic() + 20.0
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_servers_on_free_ports_do_not_meet() -> None:
    with EmbeddedNats() as one, EmbeddedNats() as other:
        assert one.port > 0
        assert one.port != other.port


async def test_it_answers_with_jetstream_on_the_loopback_interface_only() -> None:
    with EmbeddedNats() as server:
        bus = await NatsBus.connect(server.url)
        info = await bus.client.jetstream().account_info()
        assert info.streams == 0
        await bus.close()
        assert listening_addresses(server.port) == ["0100007F"]


def test_a_port_in_use_is_one_clear_error_and_leaves_nothing_behind() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = EmbeddedNats(port=port)
        with pytest.raises(PortTaken, match=f"port {port} .* in use"), server:
            pass
        assert server.pid is None


def test_another_server_on_the_port_is_not_taken_for_ours() -> None:
    with EmbeddedNats() as first, pytest.raises(PortTaken), EmbeddedNats(port=first.port):
        pass


async def test_it_comes_back_on_the_same_port_with_the_same_store(tmp_path: Path) -> None:
    with EmbeddedNats(store_dir=tmp_path) as server:
        port = server.port
        bus = await NatsBus.connect(server.url)
        await bus.client.jetstream().create_key_value(bucket="kept")
        await bus.close()
        for end in (server.stop, server.kill):
            end()
            assert server.pid is None
            server.start()
            assert server.port == port
            bus = await NatsBus.connect(server.url)
            assert (await bus.client.jetstream().key_value("kept")) is not None
            await bus.close()


def test_stopping_ends_the_process_and_closing_removes_what_was_temporary() -> None:
    server = EmbeddedNats()
    server.start()
    pid = server.pid
    assert pid is not None
    assert server.log_path.exists()
    server.stop()
    assert not is_running(pid)
    server.stop()
    log = server.log_path
    server.close()
    assert not log.exists()
    server.close()


def test_a_store_that_cannot_be_is_an_error_that_names_it(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(BusError, match=str(file)), EmbeddedNats(store_dir=file / "store"):
        pass


def test_a_server_that_ends_at_once_is_quoted() -> None:
    with pytest.raises(BusError, match=r"ended at once: .*99999"), EmbeddedNats(port=99999):
        pass


PARENT = """
import time
from kvbm_service.adapters.nats_server import PING_SECONDS, PINGS_UNANSWERED, EmbeddedNats
server = EmbeddedNats()
server.start()
print(server.pid, flush=True)
time.sleep(600)
"""


def test_it_ends_with_a_parent_that_was_killed() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.send_signal(signal.SIGKILL)
        await_end(pid)
    finally:
        parent.kill()
        parent.communicate()


def test_it_outlives_the_thread_that_started_it() -> None:
    server = EmbeddedNats()
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    try:
        time.sleep(0.2)
        assert server.pid is not None
    finally:
        server.close()


def test_a_client_that_has_vanished_is_cut_off_within_seconds() -> None:
    with EmbeddedNats() as server, socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b'CONNECT {"verbose":false}\r\nSUB questions registries 1\r\nPING\r\n')
        client.settimeout(4 * PING_SECONDS * PINGS_UNANSWERED)
        heard = b""
        while received := client.recv(4096):  # and its pings are not answered
            heard += received
        assert b"Stale Connection" in heard
