"""File systems with faults: small ones, ones that lack something, ones that can be frozen."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

Mount = Callable[..., Path]
OnLoop = Callable[[Path, int], Path]

FREEZE, THAW = 0xC0045877, 0xC0045878
"""FIFREEZE and FITHAW."""


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mounts file systems of the kinds that faults need; skips where that is not allowed."""
    with ExitStack() as stack:

        def mount(kind: str, *options: str, source: str = "none") -> Path:
            where = tmp_path / f"mount-{source.replace('/', '-')}-{kind}"
            where.mkdir()
            ran = subprocess.run(
                ["mount", "-t", kind, *options, source, where], capture_output=True, text=True
            )
            if ran.returncode:
                pytest.skip(f"{kind} cannot be mounted here: {ran.stderr.strip()}")
            stack.callback(_run, "umount", "--lazy", where)
            return where

        yield mount


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True)


@pytest.fixture
def on_loop(mount: Mount) -> Iterator[OnLoop]:
    """Mounts a file system of `nbytes` that lies in a file in some directory, with holes."""
    with ExitStack() as stack:

        def on_loop(directory: Path, nbytes: int) -> Path:
            image = directory / "image"
            with image.open("wb") as file:
                file.truncate(nbytes)
            _run("mkfs.ext4", "-q", "-O", "^has_journal", image)
            ran = subprocess.run(
                ["losetup", "--find", "--show", image], capture_output=True, text=True
            )
            if ran.returncode:
                pytest.skip(f"no loop device here: {ran.stderr.strip()}")
            device = ran.stdout.strip()
            stack.callback(_run, "losetup", "--detach", device)
            return mount("ext4", source=device)

        yield on_loop


@contextmanager
def frozen(file_system: Path) -> Iterator[None]:
    """Let nothing be written to it, so that a device that lies in it does not answer."""
    fd = os.open(file_system, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, FREEZE, 0)
        try:
            yield
        finally:
            fcntl.ioctl(fd, THAW, 0)
    finally:
        os.close(fd)
