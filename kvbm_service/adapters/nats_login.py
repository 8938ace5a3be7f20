"""What a NATS server wants to know of us: where it is, and who we are."""

from __future__ import annotations

import re
import ssl
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

from nats.aio.client import RawCredentials

from kvbm_service.adapters.masking import shown_urls
from kvbm_service.errors import SettingError

URL_SETTING = "KVBM_NATS_URL"
CREDENTIALS_SETTING = "KVBM_NATS_CREDENTIALS"
CA_SETTING = "KVBM_NATS_CA"
CERTIFICATE_SETTING = "KVBM_NATS_CERTIFICATE"
KEY_SETTING = "KVBM_NATS_KEY"

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

    def __repr__(self) -> str:
        return self.url


class TlsFiles(NamedTuple):
    """PEM files for TLS. With any of them, nothing is said to a server that has no TLS."""

    ca: str = ""
    """Who may vouch for the server; without it, those the system trusts."""
    certificate: str = ""
    key: str = ""
    """Of `certificate`, unless it stands in the same file."""

    def context(self) -> ssl.SSLContext:
        """What a connection is encrypted with. The files are read anew each time.

        Raises:
            SettingError: names the file that cannot be used.
        """
        try:
            context = ssl.create_default_context(cafile=self.ca or None)
        except OSError as error:
            raise SettingError(CA_SETTING, self.ca, _why(error)) from None
        if self.key and not self.certificate:
            raise SettingError(CERTIFICATE_SETTING, "", f"{KEY_SETTING} is of no use without it")
        if self.certificate:
            try:
                # Without a password of ours, OpenSSL would ask for one on the terminal.
                context.load_cert_chain(self.certificate, self.key or None, password="")
            except OSError as error:
                what = f"{_why(error)}; with {KEY_SETTING}, a certificate and its key"
                raise SettingError(CERTIFICATE_SETTING, self.certificate, what) from None
        return context


NO_TLS_FILES = TlsFiles()


class Login(NamedTuple):
    """Where to connect and as whom. Never show `credentials` or `servers[i].password`."""

    servers: tuple[Server, ...]
    credentials: str = ""
    tls: TlsFiles = NO_TLS_FILES

    def __str__(self) -> str:
        return ",".join(server.url for server in self.servers)

    def __repr__(self) -> str:
        return str(self)

    @property
    def must_encrypt(self) -> bool:
        """Whether credentials must not be sent in the clear, whatever the server says."""
        return any(self.tls) or any(server.url.startswith("tls:") for server in self.servers)

    @property
    def anonymous(self) -> bool:
        """Whether there is nothing to log in with."""
        return not self.credentials and not any(server.user for server in self.servers)

    def options(self) -> dict[str, Any]:
        """Arguments for nats-py's `connect`. Files are read anew each time.

        Raises:
            SettingError: a file is missing, or is not what it should be.
        """
        # Without files, nats-py trusts whom the system trusts, should the server ask for TLS.
        encryption = {"tls": self.tls.context()} if any(self.tls) else {}
        return {**encryption, **self._identity()}

    def _identity(self) -> dict[str, Any]:
        if self.credentials:
            return _explicit(self.credentials)
        for server in self.servers:
            if server.password is not None:
                return {"user": server.user, "password": server.password}
            if server.user:
                return {"token": server.user}
        return {}


def parse_login(url: str, credentials: str = "", tls: TlsFiles = NO_TLS_FILES) -> Login:
    """Take the settings apart.

    `credentials` wins over what stands in the URL. It is `user:password`, a token, or the
    path of a file; a path has a `/` in it, which the other two then cannot have: such a
    password or token goes, percent-encoded, into the URL.

    Raises:
        SettingError: names the setting; a password is not shown.
    """
    login = Login(tuple(_server(each.strip()) for each in url.split(",")), credentials, tls)
    login.options()
    return login


def _server(url: str) -> Server:
    try:
        parts = urlsplit(url if "://" in url else f"nats://{url}")
        host, port = parts.hostname, parts.port or DEFAULT_PORT
    except ValueError:
        raise SettingError(URL_SETTING, shown_urls(url), _URL_ALLOWED) from None
    if parts.scheme not in _SCHEMES or not host or parts.path not in ("", "/") or " " in url:
        raise SettingError(URL_SETTING, shown_urls(url), _URL_ALLOWED)
    shown = f"{parts.scheme}://{_bracketed(host)}:{port}"
    return Server(shown, *_userinfo(parts))


def _userinfo(parts: SplitResult) -> tuple[str, str | None]:
    password = None if parts.password is None else unquote(parts.password)
    return unquote(parts.username or ""), password


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _why(error: OSError) -> str:
    """What is wrong with a file, without a word of what is in it."""
    if isinstance(error, ssl.SSLError):
        return "it is not PEM, or not what it should be"
    return error.strerror or "it cannot be read"


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
