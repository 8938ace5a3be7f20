"""Who is let into etcd, who is not, what is said of it, and what is never said."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from kvbm_service.adapters.directory import Change
from kvbm_service.adapters.embedded_server import HOST
from kvbm_service.adapters.etcd_directory import EtcdDirectory
from kvbm_service.adapters.etcd_errors import LoginRefused, Unreachable, explain
from kvbm_service.adapters.etcd_login import PREFIX, parse_login
from kvbm_service.adapters.etcd_rpc import aio, rpc
from kvbm_service.adapters.etcd_server import EmbeddedEtcd
from kvbm_service.errors import DirectoryError, SettingError
from tests.contracts.leases import LASTING_SECONDS, until_renewed
from tests.security.certificates import Authority, Certificate

KEY = "prod.abc.node1"
NODE, OBSERVER, NOBODY, ROOT = "node", "observer", "nobody", "root"
SECRET = "s3cret/w0rd@#"
"""Of all users. Has to be percent-encoded in a URL."""
QUOTED = "s3cret%2Fw0rd%40%23"

Eventually = Callable[..., Awaitable[None]]


@pytest.mark.parametrize("details", ["context deadline exceeded", "context canceled"])
def test_a_server_that_gave_up_waiting_for_the_others_has_refused_nothing(details: str) -> None:
    login = parse_login("etcd://127.0.0.1:2379,etcd://127.0.0.1:2380")
    error = explain(login, login.members[0], rpc.StatusCode.UNKNOWN, details)
    assert isinstance(error, Unreachable), "the next one may answer"


# -- TLS -----------------------------------------------------------------------------------------


class Tls:
    """An etcd that wants certificates of its clients, and what they need."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder)
        self.client = self.authority.issue("client")
        own = self.authority.issue("server")
        self.server = EmbeddedEtcd(
            options={
                "cert-file": str(own.certificate),
                "key-file": str(own.key),
                "trusted-ca-file": str(self.authority.ca),
                "client-cert-auth": "true",
            }
        )


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tls]:
    tls = Tls(tmp_path_factory.mktemp("tls"))
    with tls.server:
        yield tls


async def entries(url: str, ca: Path | None = None, own: Certificate | None = None) -> list[str]:
    """What somebody finds who comes with these."""
    files = [str(ca or ""), *(map(str, own) if own else ("", ""))]
    directory = EtcdDirectory(parse_login(url, *files), LASTING_SECONDS)
    try:
        return [entry.key for entry in await directory.entries()]
    finally:
        await directory.close()


async def test_with_the_right_certificates_everything_works_over_tls(
    tls: Tls, eventually: Eventually
) -> None:
    login = parse_login(tls.server.url, str(tls.authority.ca), *map(str, tls.client))
    one, other = EtcdDirectory(login, LASTING_SECONDS), EtcdDirectory(login, LASTING_SECONDS)
    changes: list[Change] = []
    watch = await other.watch(changes.append)
    membership = await one.join(KEY, b"x")
    await eventually(lambda: [change.value for change in changes] == [b"x"])
    await until_renewed(other)
    assert membership.alive
    assert [entry.key for entry in await other.entries()] == [KEY]
    await watch.close()
    await one.close()
    await other.close()


async def test_a_server_that_another_authority_vouches_for_is_refused(
    tls: Tls, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "stranger")
    with pytest.raises(DirectoryError, match="not trusted; KVBM_ETCD_CA"):
        await entries(tls.server.url, stranger.ca, tls.client)


async def test_a_server_that_the_system_does_not_know_is_refused(tls: Tls) -> None:
    with pytest.raises(DirectoryError, match="not trusted; KVBM_ETCD_CA"):
        await entries(tls.server.url, None, tls.client)


async def test_a_client_without_a_certificate_is_refused(tls: Tls) -> None:
    with pytest.raises(DirectoryError, match="KVBM_ETCD_CERTIFICATE"):
        await entries(tls.server.url, tls.authority.ca)


async def test_a_client_that_another_authority_vouches_for_is_refused(
    tls: Tls, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "stranger").issue("client")
    with pytest.raises(DirectoryError, match="KVBM_ETCD_CERTIFICATE"):
        await entries(tls.server.url, tls.authority.ca, stranger)


async def test_a_plain_connection_to_a_server_with_tls_says_so(tls: Tls) -> None:
    with pytest.raises(DirectoryError, match="etcds://"):
        await entries(tls.server.url.replace("etcds:", "etcd:"))


async def test_tls_to_a_server_without_says_so(tls: Tls) -> None:
    with EmbeddedEtcd() as server, pytest.raises(DirectoryError, match="speaks no TLS"):
        await entries(server.url.replace("etcd:", "etcds:"), tls.authority.ca, tls.client)


def test_files_that_are_not_what_they_should_be_are_refused_at_start(
    tls: Tls, tmp_path: Path
) -> None:
    url, ca = "etcds://127.0.0.1", str(tls.authority.ca)
    certificate, key = map(str, tls.client)
    bad = tmp_path / "bad.pem"
    bad.write_text("not a certificate")
    other_key = str(tls.authority.issue("other").key)
    for files, setting in (
        ((str(bad), "", ""), "KVBM_ETCD_CA"),
        ((str(tmp_path / "absent"), "", ""), "KVBM_ETCD_CA"),
        ((ca, str(bad), key), "KVBM_ETCD_CERTIFICATE"),
        ((ca, certificate, other_key), "KVBM_ETCD_CERTIFICATE"),
        ((ca, certificate, ""), "KVBM_ETCD_KEY"),
        ((ca, "", key), "KVBM_ETCD_CERTIFICATE"),
    ):
        with pytest.raises(SettingError, match=setting):
            parse_login(url, *files)


async def test_a_certificate_that_is_spoilt_later_is_an_error_of_the_directory(
    tls: Tls, tmp_path: Path
) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_bytes(tls.authority.ca.read_bytes())
    directory = EtcdDirectory(parse_login(tls.server.url, str(ca)), LASTING_SECONDS)
    ca.write_text("oops")
    with pytest.raises(DirectoryError, match="KVBM_ETCD_CA"):
        await directory.entries()
    await directory.close()


# -- users and roles -----------------------------------------------------------------------------


async def set_up_roles(server: EmbeddedEtcd) -> None:
    """A node may read and write our keys, an observer read them, nobody neither."""
    permission = rpc.Permission
    allowed = {NODE: permission.READWRITE, OBSERVER: permission.READ}
    prefix, end = PREFIX.encode(), (PREFIX[:-1] + "0").encode()
    async with aio.insecure_channel(f"{HOST}:{server.port}") as channel:
        auth = rpc.AuthStub(channel)
        for user in (ROOT, NODE, OBSERVER, NOBODY):
            await auth.UserAdd(rpc.AuthUserAddRequest(name=user, password=SECRET))
            await auth.RoleAdd(rpc.AuthRoleAddRequest(name=user))
            await auth.UserGrantRole(rpc.AuthUserGrantRoleRequest(user=user, role=user))
        for role, kind in allowed.items():
            keys = permission(permType=kind, key=prefix, range_end=end)
            request = rpc.AuthRoleGrantPermissionRequest(name=role, perm=keys)
            await auth.RoleGrantPermission(request)
        await auth.AuthEnable(rpc.AuthEnableRequest())


@contextlib.asynccontextmanager
async def locked_etcd(**options: str) -> AsyncIterator[EmbeddedEtcd]:
    """An etcd that wants to know who asks. Passwords cost it little to check."""
    flags = {name.replace("_", "-"): value for name, value in options.items()}
    with EmbeddedEtcd(options={"bcrypt-cost": "4", **flags}) as server:
        await set_up_roles(server)
        yield server


@pytest.fixture
async def locked() -> AsyncIterator[EmbeddedEtcd]:
    async with locked_etcd() as server:
        yield server


def url_of(server: EmbeddedEtcd, user: str, password: str = QUOTED) -> str:
    return server.url.replace("://", f"://{user}:{password}@")


Log = pytest.LogCaptureFixture


@pytest.fixture(autouse=True)
def nothing_secret_is_said(caplog: Log) -> Iterator[None]:
    """By no test here, at no level."""
    caplog.set_level(logging.DEBUG)
    yield
    for secret in (SECRET, QUOTED, "token"):
        assert secret not in caplog.text.replace("auth-token", "")


async def test_a_node_with_user_and_password_takes_part(
    locked: EmbeddedEtcd, eventually: Eventually
) -> None:
    one = EtcdDirectory(parse_login(url_of(locked, NODE)), LASTING_SECONDS)
    other = EtcdDirectory(parse_login(url_of(locked, OBSERVER)), LASTING_SECONDS)
    changes: list[Change] = []
    watch = await other.watch(changes.append)
    membership = await one.join(KEY, b"x")
    await eventually(lambda: [change.value for change in changes] == [b"x"])
    assert [entry.key for entry in await other.entries()] == [KEY]
    await membership.leave()
    await eventually(lambda: changes[-1].value is None)
    await watch.close()
    await one.close()
    await other.close()


async def test_an_observer_cannot_take_part(locked: EmbeddedEtcd) -> None:
    directory = EtcdDirectory(parse_login(url_of(locked, OBSERVER)), LASTING_SECONDS)
    with pytest.raises(DirectoryError, match=r"does not let observer .* kvbm/members/"):
        await directory.join(KEY, b"x")
    assert await directory.entries() == []
    await directory.close()


async def test_a_user_without_a_role_sees_nothing(locked: EmbeddedEtcd) -> None:
    directory = EtcdDirectory(parse_login(url_of(locked, NOBODY)), LASTING_SECONDS)
    for attempt in (directory.entries(), directory.watch(print)):
        with pytest.raises(DirectoryError, match="does not let nobody"):
            await attempt
    await directory.close()


async def test_who_may_read_only_some_keys_cannot_watch_all(locked: EmbeddedEtcd) -> None:
    """etcd says so in the watch itself, where aetcd's own client would never hear of it."""
    directory = EtcdDirectory(parse_login(url_of(locked, NOBODY)), LASTING_SECONDS)
    with pytest.raises(DirectoryError, match="does not let nobody"):
        await anext(directory._members._changes("", 0))
    await directory.close()


async def test_a_wrong_password_is_refused_and_not_shown(locked: EmbeddedEtcd, caplog: Log) -> None:
    directory = EtcdDirectory(parse_login(url_of(locked, NODE, "wrong-word")), LASTING_SECONDS)
    for _ in range(3):
        with pytest.raises(LoginRefused, match=r"refuses user node.*KVBM_DIRECTORY_URL") as refused:
            await directory.entries()
        assert "wrong-word" not in str(refused.value)
    refusals = [line for line in caplog.messages if "refuses user" in line]
    assert len(refusals) == 1, "it is logged once"
    assert "wrong-word" not in caplog.text
    await directory.close()


async def test_no_password_where_one_is_wanted_says_so(locked: EmbeddedEtcd) -> None:
    directory = EtcdDirectory(parse_login(locked.url), LASTING_SECONDS)
    with pytest.raises(DirectoryError, match=r"wants a login.*KVBM_DIRECTORY_URL"):
        await directory.entries()
    await directory.close()


async def test_a_password_where_none_is_wanted_does_no_harm() -> None:
    with EmbeddedEtcd() as server:
        directory = EtcdDirectory(parse_login(url_of(server, NODE)), LASTING_SECONDS)
        assert await directory.entries() == []
        await set_up_roles(server)
        assert await directory.entries() == [], "and is used as soon as one is"
        await directory.close()


# -- logins that end -----------------------------------------------------------------------------


def jwt(folder: Path, seconds: int) -> str:
    """Tokens that end so soon, however much they are used."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    private, public = folder / "jwt.key", folder / "jwt.pub"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return f"jwt,pub-key={public},priv-key={private},sign-method=RS256,ttl={seconds}s"


@pytest.mark.parametrize("kind", ["jwt", "simple"])
async def test_a_login_that_has_ended_is_renewed_unnoticed(
    tmp_path: Path, caplog: Log, kind: str
) -> None:
    # A simple token ends when it was not used for so long.
    options = {"auth_token": jwt(tmp_path, 1)} if kind == "jwt" else {"auth_token_ttl": "1"}
    async with locked_etcd(**options) as server:
        login = parse_login(url_of(server, NODE))
        one, other = EtcdDirectory(login, LASTING_SECONDS), EtcdDirectory(login, LASTING_SECONDS)
        changes: list[Change] = []
        watch = await other.watch(changes.append)
        membership = await one.join(KEY, b"x")
        for number in range(3):
            await asyncio.sleep(2.5)
            await membership.update(b"%d" % number)
        assert membership.alive
        assert [entry.value for entry in await other.entries()] == [b"2"]
        assert [change.value for change in changes] == [b"x", b"0", b"1", b"2"]
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        await watch.close()
        await one.close()
        await other.close()


async def test_an_etcd_that_restarts_forgets_logins_and_is_told_again(
    locked: EmbeddedEtcd, eventually: Eventually
) -> None:
    login = parse_login(url_of(locked, NODE))
    one, other = EtcdDirectory(login, LASTING_SECONDS), EtcdDirectory(login, LASTING_SECONDS)
    changes: list[Change] = []
    watch = await other.watch(changes.append)
    membership = await one.join(KEY, b"x")
    locked.kill()
    await asyncio.to_thread(locked.start)
    await eventually(lambda: membership.alive)
    await membership.update(b"y")
    await eventually(lambda: [change.value for change in changes][-1:] == [b"y"])
    await watch.close()
    await one.close()
    await other.close()


# -- what cannot be understood -------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://host:2379",
        "etcd://",
        "etcd://host:port",
        "etcd://host:99999",
        "etcd://host/path",
        "etcd://user@host",
        "etcd://user:geheim@host,http://user:geheim@other",
        "etcd://user:geheim@ho st",
    ],
)
def test_a_url_that_makes_no_sense_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(SettingError, match="KVBM_DIRECTORY_URL") as refused:
        parse_login(url)
    assert "geheim" not in str(refused.value)


def test_a_login_shows_no_password() -> None:
    login = parse_login("etcd://user:geheim@one:1,etcds://two,etcd://[::1]:3")
    assert (login.user, login.password) == ("user", "geheim")
    assert str(login) == "etcd://one:1,etcds://two:2379,etcd://[::1]:3"
    assert "geheim" not in f"{login} {login!r} {login.members}"
