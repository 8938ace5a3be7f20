"""What faults are made with: they really do what they say."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.passage import OPEN, Passage, Passages, Way
from tests.chaos.wall_clock import WallClock

PATIENCE_SECONDS = 20.0
SILENCE_SECONDS = 0.3
HOUR_SECONDS = 3600
WATCH = "import time; print(time.time(), flush=True); input(); print(time.time(), time.sleep(0.01))"


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that says back whatever it hears."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with connection:
            while heard := connection.recv(1 << 16):
                connection.sendall(heard)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.fixture
def passage(echo: int) -> Iterator[Passage]:
    with Passages() as passages:
        yield passages.to(echo)


def connect(passage: Passage) -> socket.socket:
    return socket.create_connection(("127.0.0.1", passage.port), PATIENCE_SECONDS)


def is_silent(connection: socket.socket) -> bool:
    connection.settimeout(SILENCE_SECONDS)
    try:
        return not connection.recv(1)
    except TimeoutError:
        return True
    finally:
        connection.settimeout(PATIENCE_SECONDS)


def has_ended(connection: socket.socket) -> bool:
    """Whether nothing comes any more; waits for it."""
    try:
        return not connection.recv(1)
    except ConnectionError:
        return True


def test_an_open_passage_passes_everything_on(passage: Passage) -> None:
    said = bytes(range(256)) * 1000
    with connect(passage) as connection:
        threading.Thread(target=connection.sendall, args=(said,)).start()
        heard = b""
        while len(heard) < len(said):
            heard += connection.recv(1 << 16)
    assert heard == said


def test_a_cut_passage_ends_its_connections_and_makes_none(passage: Passage) -> None:
    with connect(passage) as old:
        old.sendall(b"1")
        assert old.recv(1) == b"1"
        passage.become(Way(cut=True))
        assert has_ended(old)
    with connect(passage) as new:
        assert has_ended(new)
    passage.become(OPEN)
    with connect(passage) as again:
        again.sendall(b"3")
        assert again.recv(1) == b"3"


@pytest.mark.parametrize("way", [Way(deaf=True), Way(mute=True)])
def test_what_is_blocked_in_one_direction_arrives_when_it_is_open(
    passage: Passage, way: Way
) -> None:
    with connect(passage) as connection:
        connection.sendall(b"1")
        assert connection.recv(1) == b"1"
        passage.become(way)
        connection.sendall(b"2")
        assert is_silent(connection)
        passage.become(OPEN)
        assert connection.recv(1) == b"2"


def test_a_slow_passage_takes_its_time_both_ways(passage: Passage) -> None:
    passage.become(Way(delay_seconds=0.1))
    with connect(passage) as connection:
        began = time.monotonic()
        connection.sendall(b"1")
        assert connection.recv(1) == b"1"
        assert time.monotonic() - began >= 0.2


def test_a_running_process_sees_its_wall_clock_jump_and_sleeps_as_before(tmp_path: Path) -> None:
    clock = WallClock(tmp_path / "clock")
    if not clock.works:
        pytest.skip("no C compiler here: wall clocks cannot be shifted")
    with subprocess.Popen(
        [sys.executable, "-c", WATCH],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=dict(clock.environment),
    ) as process:
        assert process.stdout is not None
        before = float(process.stdout.readline())
        clock.shift(-HOUR_SECONDS)
        after, _ = process.communicate(b"\n", timeout=PATIENCE_SECONDS)
    assert abs(before - time.time()) < HOUR_SECONDS / 2
    assert abs(float(after.split()[0]) + HOUR_SECONDS - time.time()) < HOUR_SECONDS / 2
