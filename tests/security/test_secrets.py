"""Secrets, planted in every form and every place: none is ever shown."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbm_schemas.subjects import Scope
from kvbm_service.adapters.nats_bus import NatsBus
from kvbm_service.adapters.nats_login import parse_login
from kvbm_service.cli import main
from kvbm_service.errors import KvbmError, SettingError
from kvbm_service.leader_service import LeaderService
from kvbm_service.network import over_nats
from kvbm_service.settings import Layer, Settings, Source, resolve
from tests.patience import eventually
from tests.security import jwts
from tests.security.certificates import Authority
from tests.security.guarded_nats import GuardedNats, guarded_nats

PLANTED = "sEcrEt"
"""In every secret of this file, however it is written."""

COMMANDS = (
    ["config"],
    ["config", "--json"],
    ["ls"],
    ["tap", "--count", "1"],
    ["locate", "0" * 32],
    ["registry"],
)

REFUSED_URLS = (
    f"nats://me:{PLANTED}",
    f"nats://me:{PLANTED}/",
    f"nats://me:{PLANTED}@",
    f"nats://me:p@{PLANTED}/x",
    f"nats://me:{PLANTED}/@host:4222",
    f"nats://me:{PLANTED}#@host",
    f"nats://me:x?{PLANTED}@host",
    f"nats://me:1,{PLANTED}:@@@host:x",
    f"nats://me:{PLANTED}@host:port",
    f"nats://me:{PLANTED}@host:99999",
    f"nats://me:{PLANTED}@host:4222/path",
    f"nats://me:{PLANTED} with blanks@host",
    f"nats://host:4222?token={PLANTED}",
    f"http://me:{PLANTED}@host",
    f"nats://[{PLANTED}",
    f"me:{PLANTED}",
    f"nats://ok:4222,nats://me:{PLANTED}",
)

FILES = ("CA", "CERTIFICATE", "KEY")

REFUSED_FILES = (
    f"me:{PLANTED}",
    PLANTED,
    f"SUA{PLANTED}",
    f"-----BEGIN PRIVATE KEY-----\n{PLANTED}\n-----END PRIVATE KEY-----",
    f"~{PLANTED}:x",
)


@pytest.mark.parametrize("variable", ["KVBM_NATS_URL", "KVBM_DIRECTORY_URL"])
@pytest.mark.parametrize("url", REFUSED_URLS)
def test_a_refused_url_does_not_show_what_may_be_a_login(variable: str, url: str) -> None:
    for scheme in ("nats", "etcd") if variable == "KVBM_DIRECTORY_URL" else ("nats",):
        with pytest.raises(SettingError, match=variable) as refusal:
            Settings.load({variable: url.replace("nats://", f"{scheme}://")})
        assert PLANTED not in "".join(traceback.format_exception(refusal.value))


@pytest.mark.parametrize("url", REFUSED_URLS)
async def test_nor_does_a_bus_that_is_given_it(url: str) -> None:
    try:
        await (await NatsBus.connect(url)).close()
    except KvbmError as error:
        refusal = error
    else:
        return  # a password may have a # in it here
    assert PLANTED not in "".join(traceback.format_exception(refusal))


@pytest.mark.parametrize(
    "variable",
    [
        "KVBM_NATS_CREDENTIALS",
        *(f"KVBM_{server}_{file}" for server in ("NATS", "ETCD") for file in FILES),
    ],
)
@pytest.mark.parametrize("value", REFUSED_FILES)
def test_what_belongs_into_a_file_is_not_shown_when_it_stands_in_the_setting(
    variable: str, value: str
) -> None:
    with pytest.raises(SettingError, match=variable) as refusal:
        Settings.load({variable: value})
    assert PLANTED not in str(refusal.value)


def test_a_file_that_is_missing_is_named() -> None:
    for path in ("/etc/kvbm/me.creds", "~/me.nk", "./me.creds", "me.creds"):
        with pytest.raises(SettingError, match="me"):
            Settings.load({"KVBM_NATS_CREDENTIALS": path})


def test_the_connectors_unknown_or_double_keys_do_not_show_their_values() -> None:
    login = f"nats://me:{PLANTED}@host"
    for extra in (
        {"nats_ur": login},
        {"nats_password": PLANTED},
        {"nats_url": login, "KVBM_NATS_URL": login},
    ):
        with pytest.raises(SettingError) as refusal:
            resolve([Layer(Source.CONNECTOR, extra)])
        assert PLANTED not in str(refusal.value)


def test_neither_settings_nor_logins_print_what_they_hold() -> None:
    for url in (f"nats://me:{PLANTED}@host", f"nats://{PLANTED}@host"):
        held = [
            Settings(nats_url=url, directory_url=url.replace("nats", "etcd")),
            parse_login(url),
            parse_login("nats://host", f"me:{PLANTED}"),
        ]
        assert PLANTED not in f"{held!r} {held[0]} {held[1]} {held[1].servers!r}"  # type: ignore[union-attr]


class Places:
    """Environments with a secret in each, all of which lead to servers that refuse them."""

    def __init__(self, folder: Path, server: GuardedNats) -> None:
        authority = jwts.Authority(str(folder / "store"))
        seed, creds = folder / "me.nk", folder / "me.creds"
        self.key = jwts.Key(jwts.USER)
        seed.write_bytes(self.key.seed)
        self.creds = authority.credentials("me", jwts.Permissions((), ()))
        creds.write_text(self.creds)
        mine = Authority(folder).issue("me")
        closed = _closed_port()
        where = self._where = f"127.0.0.1:{server.port}"
        self.environments: list[dict[str, str]] = [
            {"KVBM_NATS_URL": f"nats://me:{PLANTED}@{where}"},
            {"KVBM_NATS_URL": f"nats://me:{PLANTED}%40%3A%2F@{where}"},
            {"KVBM_NATS_URL": f"nats://me:x@{PLANTED}@{where}"},
            {"KVBM_NATS_URL": f"nats://{PLANTED}@{where}"},
            {"KVBM_NATS_URL": f"tls://me:{PLANTED}@{where}"},
            {"KVBM_NATS_URL": f"nats://me:{PLANTED}@127.0.0.1:{closed}"},
            {"KVBM_NATS_URL": f"nats://me:{PLANTED}@no-such-host.invalid"},
            {"KVBM_NATS_URL": f"nats://me:{PLANTED}@{where},nats://{PLANTED}@127.0.0.1:{closed}"},
            {"KVBM_NATS_URL": f"nats://{where}", "KVBM_NATS_CREDENTIALS": str(seed)},
            {"KVBM_NATS_URL": f"nats://{where}", "KVBM_NATS_CREDENTIALS": str(creds)},
            {"KVBM_NATS_URL": f"nats://{where}", "KVBM_NATS_CA": str(mine.key)},
            {
                "KVBM_NATS_URL": f"nats://me:{PLANTED}@{where}",
                "KVBM_DIRECTORY_URL": f"etcd://me:{PLANTED}@127.0.0.1:{closed}",
            },
            *({"KVBM_NATS_URL": url} for url in REFUSED_URLS[:3]),
        ]
        self.secrets = [
            PLANTED,
            self.key.seed.decode(),
            *(line for line in self.creds.splitlines() if len(line) > 50),
            *(line for line in mine.key.read_text().splitlines() if len(line) > 50),
        ]

    def refuses(self, environ: dict[str, str]) -> bool:
        """Whether this leads to the server, which knows no such login."""
        url = environ["KVBM_NATS_URL"]
        return (
            url.startswith("nats://")
            and url.endswith(self._where)
            and "KVBM_NATS_CA" not in environ
        )

    def require_unseen(self, text: str, where: object) -> None:
        """Fail if any of the secrets stands in `text`."""
        for secret in self.secrets:
            assert secret not in text, where


def _closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Places]:
    conf = 'authorization { user: "someone", password: "else" }'
    with guarded_nats(tmp_path, conf) as server:
        yield Places(tmp_path, server)


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    """Commands set up logging for the whole process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command))
@pytest.mark.usefixtures("logging_as_before")
def test_no_command_shows_a_secret(
    places: Places,
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for environ in places.environments:
        if command == ["registry"] and not places.refuses(environ):
            continue  # it would wait for its server
        with monkeypatch.context() as patch:
            for name, value in environ.items():
                patch.setenv(name, value)
            status = main(command)
        shown = capfd.readouterr()
        assert status == 0 if command[0] == "config" and not shown.err else status in (0, 1, 2)
        assert "Traceback" not in shown.err
        places.require_unseen(shown.out + shown.err, environ)


async def test_a_leader_that_cannot_connect_logs_no_secret(
    places: Places, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    leaders = []
    for environ in places.environments[:10]:
        settings = Settings.load(environ)
        logging.getLogger(__name__).info("settings: %r", settings)
        connect = over_nats(settings, "kvbm leader node", "node")
        leader = LeaderService(settings, Scope("default", "0"), "node", 1, connect)
        leader.start()
        leaders.append(leader)
    await eventually(lambda: caplog.text.count("refuses us") >= 4)
    await eventually(lambda: "connection refused" in caplog.text)
    await asyncio.gather(*(asyncio.to_thread(leader.close) for leader in leaders))
    places.require_unseen(caplog.text, "log")


async def test_the_server_is_told_no_secret_beside_the_login(tmp_path: Path) -> None:
    """What its monitoring shows of a connection: its name, and its user."""
    monitor = _closed_port()
    conf = f'authorization {{ user: "me", password: "{PLANTED}" }}\nhttp: "127.0.0.1:{monitor}"'
    with guarded_nats(tmp_path, conf) as server:
        settings = Settings(nats_url=server.url(f"me:{PLANTED}"))
        network = await over_nats(settings, "kvbm leader node", "node")()
        reader, writer = await asyncio.open_connection("127.0.0.1", monitor)
        writer.write(b"GET /connz?auth=1&subs=1 HTTP/1.0\r\n\r\n")
        shown = (await reader.read()).decode()
        writer.close()
        assert json.loads(shown.partition("\r\n\r\n")[2])["num_connections"] == 1
        assert "kvbm leader node" in shown
        assert PLANTED not in shown
        assert PLANTED not in server.logged()
        await network.close()
