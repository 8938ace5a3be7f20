"""What a running engine has counted, read from its metrics."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Callable

PATIENCE_SECONDS = 30.0
"""What the ranks have done is counted a few of the engine's steps later."""

Samples = dict[str, float]
"""Each sample's number, by its name and labels as they stand in the text."""


def address_in(log: str) -> str:
    """Where an engine's log says that its metrics are: host and port."""
    (found,) = re.findall(r"metrics are served at http://(\S+)/metrics", log)
    return str(found)


def scrape(address: str) -> Samples:
    """What the engine has counted so far."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


def grown(
    address: str, before: Samples, enough: Callable[[Samples], bool] = lambda by: True
) -> Samples:
    """By how much each has grown since `before`, once it is enough; fails if it never is."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        now = scrape(address)
        by = {name: now[name] - before.get(name, 0.0) for name in now}
        if enough(by):
            return by
        assert time.monotonic() < deadline, {name: more for name, more in by.items() if more}
        time.sleep(0.1)
