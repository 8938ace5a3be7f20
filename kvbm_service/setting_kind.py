"""Kinds of values that a setting may have: each says in words what is allowed, and parses it."""

from __future__ import annotations

import enum
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

from kvbm_schemas.subjects import REGISTRY_NODE, is_token
from kvbm_service.adapters.masking import MASK, shown_path, shown_urls, shown_value


class Kind(NamedTuple):
    """What a value may be: in words, and as a parser raising ValueError or TypeError."""

    allowed: str
    parse: Callable[[object], Any]
    show: Callable[[Any], str | float | bool] = lambda value: value
    """The parsed value as it may be printed: in the unit it was given in, secrets masked."""
    show_refused: Callable[[str], str] = shown_value
    """A value that could not be parsed, as it may be printed."""


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def number(least: float, most: float, unit: str, scale: float = 1.0) -> Kind:
    """A number of `unit`, fractions allowed; `scale` turns it into the field's unit."""

    def parse(value: object) -> float:
        found = _number(value)
        if not least <= found <= most:
            raise ValueError
        return found * scale

    return Kind(
        f"a number{_of(unit)} from {_plain(least)} to {_plain(most)}",
        parse,
        lambda value: _plain(round(value / scale, 9)),
    )


def _of(unit: str) -> str:
    return f" of {unit}" if unit else ""


def _plain(value: float) -> float:
    """The same number, without a fraction that says nothing."""
    return int(value) if value == int(value) else value


def whole(least: int, most: int, unit: str) -> Kind:
    """A whole number of `unit`."""

    def parse(value: object) -> int:
        found = int(value) if isinstance(value, str) else _number(value)
        if found != int(found) or not least <= found <= most:
            raise ValueError
        return int(found)

    return Kind(f"a whole number{_of(unit)} from {least} to {most}", parse)


_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True}
_BOOLEANS |= {"0": False, "false": False, "no": False, "off": False}


def _parse_boolean(value: object) -> bool:
    try:
        return _BOOLEANS[str(value).strip().lower()]
    except KeyError:
        raise ValueError from None


BOOLEAN = Kind("1, true, yes or on; 0, false, no or off", _parse_boolean)


def one_of(values: type[enum.StrEnum]) -> Kind:
    """One of the words of an enumeration, in any case."""
    return Kind(" or ".join(values), lambda value: values(str(value).strip().lower()), str)


def _parse_token(value: object) -> str:
    if not isinstance(value, str) or not is_token(value):
        raise ValueError
    return value


def _parse_node_name(value: object) -> str:
    if value == "":
        return ""
    name = _parse_token(value)
    if name == REGISTRY_NODE:
        raise ValueError
    return name


_TOKEN_WORDS = "1 to 64 letters, digits, - or _"
TOKEN = Kind(_TOKEN_WORDS, _parse_token)
NODE_NAME = Kind(f"{_TOKEN_WORDS}; not {REGISTRY_NODE!r}, which is reserved", _parse_node_name)

_NATS_SCHEMES = ("nats", "tls")
_HTTP_SCHEMES = ("http", "https")
_ETCD_SCHEMES = ("etcd", "etcds")


def _url_parts(url: str, schemes: tuple[str, ...]) -> SplitResult:
    """Take one server's URL apart; raises ValueError when it cannot be one."""
    if any(character.isspace() for character in url):
        raise ValueError
    parts = urlsplit(url if "://" in url else f"{schemes[0]}://{url}")
    if parts.scheme not in schemes or not parts.hostname:
        raise ValueError
    if parts.port == 0 or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError
    return parts


def _parse_urls(value: object) -> str:
    return _parse_urls_of(value, _NATS_SCHEMES)


def _parse_urls_of(value: object, schemes: tuple[str, ...]) -> str:
    if not isinstance(value, str):
        raise TypeError
    urls = [url.strip() for url in value.split(",") if url.strip()]
    if not urls:
        raise ValueError
    return ",".join(_url_parts(url, schemes).geturl() for url in urls)


def _parse_directory_urls(value: object) -> str:
    if value == "":
        return ""
    scheme = str(value).strip().partition("://")[0]
    return _parse_urls_of(value, _ETCD_SCHEMES if scheme in _ETCD_SCHEMES else _NATS_SCHEMES)


def mask_urls(urls: str) -> str:
    """The same URLs with passwords and tokens hidden."""
    return ",".join(_mask_url(url) for url in urls.split(","))


def _mask_url(url: str) -> str:
    login, at, server = url.rpartition("@")
    scheme, separator, user = login.rpartition("://")
    name, colon, _ = user.partition(":")
    # A user without a password is a NATS token, which is a secret as well.
    return f"{scheme}{separator}{name + colon if colon else ''}{MASK}@{server}" if at else url


_NATS_WORDS = "nats://host:port (or tls://)"
URLS = Kind(f"{_NATS_WORDS}, several joined by commas", _parse_urls, mask_urls, shown_urls)
DIRECTORY_URLS = Kind(
    f"etcd://host:port (or etcds://) or {_NATS_WORDS}, several of one kind joined by commas",
    _parse_directory_urls,
    mask_urls,
    shown_urls,
)


def _parse_file(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    try:
        path = Path(value).expanduser()
    except RuntimeError:  # "~name", and nobody is called so
        raise ValueError from None
    if value and not (path.is_file() and os.access(path, os.R_OK)):
        raise ValueError
    return str(path.absolute()) if value else ""


CREDENTIALS = Kind(
    "the path of a .creds file (or nkey seed) that can be read",
    _parse_file,
    show_refused=shown_path,
)
PEM = Kind("the path of a PEM file that can be read", _parse_file, show_refused=shown_path)


def _parse_directory(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    try:
        path = Path(value).expanduser()
    except RuntimeError:
        raise ValueError from None
    if "\0" in value or (path.exists() and not path.is_dir()):
        raise ValueError
    return str(path.absolute())


DIRECTORY = Kind("the path of a directory", _parse_directory)

NOWHERE = "none"
"""What says that no directory is wanted: an empty variable would count as unset."""


def _parse_directory_or_none(value: object) -> str:
    return "" if str(value).strip().lower() == NOWHERE else _parse_directory(value)


DIRECTORY_OR_NONE = Kind(
    f"the path of a directory, or {NOWHERE}",
    _parse_directory_or_none,
    lambda value: value or NOWHERE,
)


def _matching(pattern: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value, re.ASCII):
            raise ValueError
        return value

    return parse


BACKEND = Kind("the name of a NIXL backend: 1 to 64 letters, digits or _", _matching(r"\w{1,64}"))
ADDRESS = Kind("an address or a host's name", _matching(r"[\w.:%-]{1,255}"))


def parse_http_url(value: object) -> str:
    """The base URL of an HTTP server, without the `/v1` that clients are often given.

    Raises:
        ValueError, TypeError: it is none.
    """
    if not isinstance(value, str):
        raise TypeError
    url = value.strip().rstrip("/").removesuffix("/v1")
    parts = urlsplit(url)
    good = parts.scheme in _HTTP_SCHEMES and parts.hostname and parts.port != 0
    if not good or parts.query or parts.fragment or "@" in parts.netloc or len(url) > 256:
        raise ValueError
    if any(character.isspace() for character in url):
        raise ValueError
    return url


HTTP_URL = Kind(
    "http://host:port (or https://), without a login",
    lambda value: parse_http_url(value) if value else "",
    show_refused=shown_urls,
)
