"""What an etcd server wants to know of us: where it is, who we are, and whom we trust."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from kvbm_service.errors import SettingError

URL_SETTING = "KVBM_DIRECTORY_URL"
CA_SETTING = "KVBM_ETCD_CA"
CERTIFICATE_SETTING = "KVBM_ETCD_CERTIFICATE"
KEY_SETTING = "KVBM_ETCD_KEY"

PREFIX = "kvbm/members/"
"""Where our keys are: a role needs to read and write what begins so, and nothing else."""

DEFAULT_PORT = 2379
MAX_PEM_BYTES = 1 << 20

_PLAIN, _TLS = "etcd", "etcds"
_URL_ALLOWED = "etcd://[user:password@]host:port (or etcds:// for TLS), or several joined by commas"
_SYSTEM_CA = ssl.get_default_verify_paths().cafile


class Member(NamedTuple):
    """One server of an etcd cluster."""

    host: str
    port: int
    tls: bool

    @property
    def address(self) -> str:
        """As gRPC wants it."""
        return f"{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{_TLS if self.tls else _PLAIN}://{self.address}"


class Pem(NamedTuple):
    """What certificates are made of. `key` is a secret."""

    ca: bytes | None
    certificate: bytes | None
    key: bytes | None


@dataclass(frozen=True)
class EtcdLogin:
    """Where to connect and as whom."""

    members: tuple[Member, ...]
    user: str = ""
    password: str = field(default="", repr=False)
    """Never show it."""
    ca: str = ""
    certificate: str = ""
    key: str = ""

    def __str__(self) -> str:
        return ",".join(map(str, self.members))

    def read_pem(self) -> Pem:
        """The files' contents; read anew each time, as certificates are replaced.

        Raises:
            SettingError: a file cannot be read, or is not what it should be.
        """
        self._try_out()
        ca = self.ca or _SYSTEM_CA
        return Pem(
            _read(CA_SETTING, ca) if ca else None,
            _read(CERTIFICATE_SETTING, self.certificate) if self.certificate else None,
            _read(KEY_SETTING, self.key) if self.key else None,
        )

    def _try_out(self) -> None:
        """gRPC would only log what is wrong with them, and go on without."""
        trial = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            if self.ca:
                trial.load_verify_locations(self.ca)
        except OSError as error:  # ssl.SSLError is one
            raise _bad_file(CA_SETTING, self.ca, "PEM certificates", error) from None
        try:
            if self.certificate:
                trial.load_cert_chain(self.certificate, self.key, password="")
        except OSError as error:
            pair = f"a PEM certificate with its key (unencrypted) in {KEY_SETTING}"
            raise _bad_file(CERTIFICATE_SETTING, self.certificate, pair, error) from None


def parse_login(urls: str, ca: str = "", certificate: str = "", key: str = "") -> EtcdLogin:
    """Take the settings apart. The first user found in a URL is used for all servers.

    Raises:
        SettingError: names the setting; a password is not shown.
    """
    if bool(certificate) != bool(key):
        missing = KEY_SETTING if certificate else CERTIFICATE_SETTING
        raise SettingError(missing, "", "a certificate and its key go together: set both")
    found = [_member(url.strip()) for url in urls.split(",")]
    user, password = next((user for _, user in found if user[0]), ("", ""))
    login = EtcdLogin(tuple(member for member, _ in found), user, password, ca, certificate, key)
    if any(member.tls for member in login.members):
        login.read_pem()
    return login


def _member(url: str) -> tuple[Member, tuple[str, str]]:
    try:
        parts = urlsplit(url)
        port = parts.port or DEFAULT_PORT
    except ValueError:
        raise SettingError(URL_SETTING, _without_secrets(url), _URL_ALLOWED) from None
    alone = parts.path in ("", "/") and not (parts.query or parts.fragment or " " in url)
    half_a_login = bool(parts.username) != (parts.password is not None)
    if parts.scheme not in (_PLAIN, _TLS) or not parts.hostname or not alone or half_a_login:
        raise SettingError(URL_SETTING, _without_secrets(url), _URL_ALLOWED)
    user = unquote(parts.username or ""), unquote(parts.password or "")
    return Member(parts.hostname, port, parts.scheme == _TLS), user


def _without_secrets(url: str) -> str:
    return re.sub(r"//.*@", "//***@", url) if "//" in url else url.rpartition("@")[2]


def _read(setting: str, path: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(MAX_PEM_BYTES)
    except OSError as error:
        raise _bad_file(setting, path, "a PEM file that can be read", error) from None


def _bad_file(setting: str, path: str, wanted: str, error: OSError) -> SettingError:
    reason = error.strerror or getattr(error, "reason", None) or "not understood"
    return SettingError(setting, path, f"{wanted} ({reason})")
