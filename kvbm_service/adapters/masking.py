"""How a value is shown that was refused, and so may be anything: also a secret in a wrong place."""

from __future__ import annotations

import re

MASK = "****"
"""Shown instead of a secret."""

_HOST = r"([\w.-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,6})?/?"
_SERVER = rf"(\w+://)?({_HOST})?"
_PATH = re.compile(r"(/|~[\w-]*/|\./|\.\./).{0,4096}|[\w.-]+\.(creds|nk|seed|pem|crt|cer|key)")


def shown_urls(text: str) -> str:
    """What may be servers' URLs, with everything hidden that may be part of a login."""
    return ",".join(_shown_url(each.strip()) for each in text.split(","))


def _shown_url(text: str) -> str:
    if re.fullmatch(_SERVER, text):
        return text
    scheme, _, _ = text.partition("://")
    shown = f"{scheme}://" if re.fullmatch(r"[a-z]{1,8}", scheme) else ""
    # What follows the last @ is a server, unless a login with an @ stands there without one.
    server = text.rpartition("@")[2]
    return f"{shown}{MASK}@{server}" if re.fullmatch(_HOST, server) else f"{shown}{MASK}"


def shown_path(text: str) -> str:
    """What may be a file's path, or what ought to be in that file."""
    return text if _PATH.fullmatch(text) else MASK


def shown_value(text: str) -> str:
    """What may be anything."""
    return MASK if "@" in text or "\n" in text else text
