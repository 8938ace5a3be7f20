"""Seeing to it that no later life finds what was there before a reset.

The ranks hear of a reset with the engine's next step, which may never come: the engine may be idle,
or be killed. So the leader's process forgets at once what lies on its own machine, which is all of
it unless the ranks are spread over several.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from kvbm_schemas.subjects import Scope
from kvbm_service.adapters.homes import begin_generation
from kvbm_service.settings import Settings

_log = logging.getLogger(__name__)

FORGET_SECONDS = 1.0
"""The engine waits so long until it is written down. It takes a moment, or the disk hangs."""

_AND_THEN = "remove that directory before the next start"


def for_good(*steps: Callable[[], None]) -> Callable[[], None]:
    """A function that carries out all of `steps`, whichever fail. Neither raises nor hangs."""

    def carry_out() -> None:
        for step in steps:
            try:
                step()
            except OSError as error:
                _log.error(
                    "a later engine may find blocks of before this reset: %s cannot be written "
                    "(%s); %s", error.filename, error.strerror, _AND_THEN,
                )  # fmt: skip

    def forget() -> None:
        thread = threading.Thread(target=carry_out, name="kvbm-forget", daemon=True)
        thread.start()
        thread.join(FORGET_SECONDS)
        if thread.is_alive():
            _log.error(
                "a later engine may find blocks of before this reset: a disk does not answer; "
                "if it stays so, start with another DYN_KVBM_DISK_CACHE_DIR"
            )

    return forget


def homes(settings: Settings, scope: Scope) -> list[Callable[[], None]]:
    """Steps that forget every home of `scope` on this machine, this engine's or not."""
    roots = [root for root in (settings.host_cache_dir, settings.disk_cache_dir) if root]
    return [partial(begin_generation, Path(root), scope) for root in roots]
