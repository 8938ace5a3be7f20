"""Where nodes meet: a real nats-server, and a directory on it or on a real etcd."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvbm_service.adapters.etcd_server import EmbeddedEtcd, etcd_binary
from kvbm_service.adapters.nats_server import EmbeddedNats
from kvbm_service.errors import DirectoryError

DIRECTORIES = ["nats", "etcd"]


def open_meeting_place(directory: str, folder: Path, ending: ExitStack) -> dict[str, Any]:
    """Start what it takes. Returns the settings by which it is found; skips if it is not here."""
    if directory == "etcd":
        try:
            etcd_binary()
        except DirectoryError as error:
            pytest.skip(str(error))
    settings = {"nats_url": ending.enter_context(EmbeddedNats(store_dir=folder / "nats")).url}
    if directory == "etcd":
        etcd = ending.enter_context(EmbeddedEtcd(store_dir=folder / "etcd"))
        settings["directory_url"] = etcd.url
    return settings
