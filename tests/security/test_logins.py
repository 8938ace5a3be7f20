"""Every way to log in to NATS, each on a real server that wants it and takes nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbm_service.adapters.nats_bus import NatsBus
from kvbm_service.adapters.nats_permissions import observer, operator
from kvbm_service.errors import BusError, BusUnavailable, Forbidden, SettingError
from tests.security import jwts
from tests.security.guarded_nats import GuardedNats, guarded_nats

PASSWORD = "p@ss:w/rd%?#[é"
QUOTED = "p%40ss%3Aw%2Frd%25%3F%23%5B%C3%A9"


async def greeted(url: str, credentials: str = "") -> bool:
    """Whether we are let in."""
    bus = await NatsBus.connect(url, credentials)
    connected = bus.connected
    await bus.close()
    return connected


async def refused(url: str, credentials: str = "") -> str:
    """What we are told when we are not let in."""
    with pytest.raises(BusUnavailable) as refusal:
        await NatsBus.connect(url, credentials)
    return str(refusal.value)


@pytest.fixture
def with_password(tmp_path: Path) -> Iterator[GuardedNats]:
    conf = f'authorization {{ user: "me@here", password: "{PASSWORD}" }}'
    with guarded_nats(tmp_path, conf) as server:
        yield server


async def test_a_password_in_the_url_may_have_any_characters(with_password: GuardedNats) -> None:
    assert await greeted(with_password.url(f"me%40here:{QUOTED}"))


async def test_without_credentials_nobody_is_let_in_and_it_is_said_what_to_set(
    with_password: GuardedNats,
) -> None:
    words = await refused(with_password.url())
    assert "set user and password in KVBM_NATS_URL, or KVBM_NATS_CREDENTIALS" in words


async def test_wrong_credentials_are_told_apart_from_none(with_password: GuardedNats) -> None:
    words = await refused(with_password.url("me%40here:planted-and-wrong"))
    assert "check user and password" in words
    assert "planted" not in words


async def test_a_token_in_the_url_logs_in(tmp_path: Path) -> None:
    with guarded_nats(tmp_path, 'authorization { token: "s3cr3t-t0ken" }') as server:
        assert await greeted(server.url("s3cr3t-t0ken"))
        assert "s3cr3t" not in await refused(server.url("s3cr3t-wrong"))


async def test_an_nkey_seed_in_a_file_logs_in_and_another_one_does_not(tmp_path: Path) -> None:
    key, other = jwts.Key(jwts.USER), jwts.Key(jwts.USER)
    seed = tmp_path / "me.nk"
    seed.write_bytes(key.seed + b"\n")
    with guarded_nats(
        tmp_path, f"authorization {{ users: [ {{ nkey: {key.public} }} ] }}"
    ) as server:
        assert await greeted(server.url(), str(seed))
        seed.write_bytes(other.seed)
        assert other.seed.decode() not in await refused(server.url(), str(seed))


async def test_a_creds_file_logs_in_with_what_its_jwt_allows(tmp_path: Path) -> None:
    authority = jwts.Authority(str(tmp_path / "store"))
    file = tmp_path / "observer.creds"
    file.write_text(authority.credentials("observer", observer()))
    with guarded_nats(tmp_path, authority.configuration) as server:
        bus = await NatsBus.connect(server.url(), str(file))
        with pytest.raises(Forbidden):
            await bus.request("kvbm.default.layout.node-1.lease", b"", 5.0)
        await bus.close()
        strangers = jwts.Authority(str(tmp_path / "other"))
        file.write_text(strangers.credentials("operator", operator()))
        assert "KVBM_NATS_CREDENTIALS" in await refused(server.url(), str(file))


async def test_a_creds_file_that_has_been_replaced_counts_from_the_next_connection_on(
    tmp_path: Path,
) -> None:
    authority = jwts.Authority(str(tmp_path / "store"))
    file = tmp_path / "me.creds"
    with guarded_nats(tmp_path, authority.configuration) as server:
        for name in ("first", "second"):
            file.write_text(authority.credentials(name, operator()))
            assert await greeted(server.url(), str(file))


@pytest.mark.parametrize(
    "content",
    ["", "not a seed", jwts.Key(jwts.ACCOUNT).seed.decode(), "BEGIN NATS USER JWT\nplanted\n"],
    ids=["empty", "nonsense", "an account's", "no seed"],
)
async def test_a_file_without_a_seed_is_named_and_its_content_is_not(
    tmp_path: Path, content: str
) -> None:
    file = tmp_path / "me.creds"
    file.write_text(content)
    with pytest.raises(SettingError, match=r"KVBM_NATS_CREDENTIALS.*me\.creds") as refusal:
        await NatsBus.connect("nats://127.0.0.1:4", str(file))
    assert not content or content not in str(refusal.value)


async def test_a_question_that_is_forbidden_fails_at_once_and_says_so(tmp_path: Path) -> None:
    conf = 'authorization { users: [ { user: u, password: p, permissions: { publish: "ok" } } ] }'
    with guarded_nats(tmp_path, conf) as server:
        bus = await NatsBus.connect(server.url("u:p"))
        with pytest.raises(Forbidden, match="permissions violation"):
            await bus.request("Not.Allowed", b"", 20.0)
        with pytest.raises(BusError, match="nobody listens on ok"):
            await bus.request("ok", b"", 20.0)
        await bus.close()
