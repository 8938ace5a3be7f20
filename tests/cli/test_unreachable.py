"""No NATS, a wrong URL, wrong credentials: one line, with the cure, from every command."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from kvbm_service.adapters.nats_server import EmbeddedNats

COMMANDS = [["tap"], ["ls"], ["locate", "0" * 32]]


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that nobody listens on, and that nobody else gets meanwhile."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture(scope="module")
def locked_nats() -> Iterator[EmbeddedNats]:
    with EmbeddedNats(user="someone", password="secret") as server:
        yield server


@pytest.mark.parametrize("command", COMMANDS)
def test_without_nats_a_command_says_where_it_looked(
    kvbm, closed_port: int, command: list[str]
) -> None:
    done = kvbm(*command, KVBM_NATS_URL=f"nats://127.0.0.1:{closed_port}")
    assert done.returncode == 1
    assert done.stdout == b""
    assert done.stderr.count(b"\n") == 1
    assert done.stderr.startswith(b"kvbm: no connection to NATS at nats://127.0.0.1:")
    assert str(closed_port).encode() in done.stderr
    assert b"KVBM_NATS_URL" in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_credentials_are_told_apart_and_not_shown(kvbm, locked_nats, command) -> None:
    url = f"nats://someone:wrong-word@127.0.0.1:{locked_nats.port}"
    done = kvbm(*command, "--nats-url", url)
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert b"refuses us" in done.stderr
    assert b"wrong-word" not in done.stderr


def test_the_right_credentials_in_the_url_are_let_in(kvbm, locked_nats) -> None:
    url = f"nats://someone:secret@127.0.0.1:{locked_nats.port}"
    done = kvbm("ls", "--nats-url", url)
    assert done.returncode == 0
    assert b"No nodes" in done.stdout
