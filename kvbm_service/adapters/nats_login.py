"""What a NATS server wants to know of us: where it is, and who we are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

from nats.aio.client import RawCredentials

from kvbm_service.errors import SettingError

URL_SETTING = "KVBM_NATS_URL"
CREDENTIALS_SETTING = "KVBM_NATS_CREDENTIALS"

MAX_CREDENTIALS_BYTES = 64 << 10
DEFAULT_PORT = 4222

_SCHEMES = ("nats", "tls")
_URL_ALLOWED = "nats://[user:password@]host:port, or several joined by commas"
_CREDENTIALS_ALLOWED = (
    "`user:password`, a token, or the path (with a `/`) of a .creds file or of an nkey seed"
)
_SEED = re.compile(r"SU[A-Z2-7]{56}")


class Server(NamedTuple):
    """One address, without secrets, and the secrets that stood in its URL."""

    url: str
    user: str = ""
    password: str | None = None


class Login(NamedTuple):
    """Where to connect and as whom. Never show `credentials` or `servers[i].password`."""

    servers: tuple[Server, ...]
    credentials: str = ""

    def __str__(self) -> str:
        return ",".join(server.url for server in self.servers)

    def options(self) -> dict[str, Any]:
        """Arguments for nats-py's `connect`. Files are read anew each time.

        Raises:
            SettingError: a credentials file is missing, or is none.
        """
        if self.credentials:
            return _explicit(self.credentials)
        for server in self.servers:
            if server.password is not None:
                return {"user": server.user, "password": server.password}
            if server.user:
                return {"token": server.user}
        return {}


def parse_login(url: str, credentials: str = "") -> Login:
    """Take the two settings apart.

    `credentials` wins over what stands in the URL. It is `user:password`, a token, or the
    path of a file; a path has a `/` in it, which the other two then cannot have: such a
    password or token goes, percent-encoded, into the URL.

    Raises:
        SettingError: names the setting; a password is not shown.
    """
    login = Login(tuple(_server(each.strip()) for each in url.split(",")), credentials)
    login.options()
    return login


def _server(url: str) -> Server:
    try:
        parts = urlsplit(url if "://" in url else f"nats://{url}")
        host, port = parts.hostname, parts.port or DEFAULT_PORT
    except ValueError:
        raise SettingError(URL_SETTING, _without_secrets(url), _URL_ALLOWED) from None
    if parts.scheme not in _SCHEMES or not host or parts.path not in ("", "/") or " " in url:
        raise SettingError(URL_SETTING, _without_secrets(url), _URL_ALLOWED)
    shown = f"{parts.scheme}://{_bracketed(host)}:{port}"
    return Server(shown, *_userinfo(parts))


def _userinfo(parts: SplitResult) -> tuple[str, str | None]:
    password = None if parts.password is None else unquote(parts.password)
    return unquote(parts.username or ""), password


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _without_secrets(url: str) -> str:
    return re.sub(r"//[^/]*@", "//***@", url) if "//" in url else url.rpartition("@")[2]


def _explicit(credentials: str) -> dict[str, Any]:
    if "/" in credentials:
        return _from_file(Path(credentials).expanduser())
    user, colon, password = credentials.partition(":")
    if colon:
        return {"user": user, "password": password}
    return {"token": credentials}


def _from_file(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CREDENTIALS_BYTES:
            raise SettingError(CREDENTIALS_SETTING, str(path), _CREDENTIALS_ALLOWED)
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise SettingError(
            CREDENTIALS_SETTING, str(path), f"{reason}; {_CREDENTIALS_ALLOWED}"
        ) from None
    seed = _SEED.search(text)
    if seed is None or not _is_seed(seed.group()):
        raise SettingError(CREDENTIALS_SETTING, str(path), "no user's nkey seed in this file")
    # nats-py reads on for ever when this line is missing.
    if "-----BEGIN NATS USER JWT-----" in text:
        return {"user_credentials": RawCredentials(text)}
    return {"nkeys_seed_str": seed.group()}


def _is_seed(text: str) -> bool:
    """Whether nats-py could sign with it.

    Raises:
        SettingError: we lack the library to tell, and to use it.
    """
    try:
        import nkeys  # type: ignore[import-untyped,unused-ignore]  # brings a C library along
    except ImportError:
        raise SettingError(
            CREDENTIALS_SETTING, "a file", "nkeys and .creds need `pip install nats-py[nkeys]`"
        ) from None
    try:
        nkeys.from_seed(bytearray(text.encode())).wipe()
    except (nkeys.NkeysError, ValueError):
        return False
    return True
