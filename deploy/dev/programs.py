"""Finds the programs that some tests need and that are no Python packages, or fetches them.

    python3 deploy/dev/programs.py    silent if all are there; one line for each otherwise

What is not on this machine is unpacked from Debian's package into `build/<package>`; nothing is
installed, and no list of the system's is changed. Uses the standard library only.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

BUILD = Path(__file__).resolve().parents[2] / "build"
DOWNLOAD_SECONDS = 300


class Package(NamedTuple):
    """A package of Debian's, the files in it that are wanted, and what for."""

    name: str
    files: tuple[str, ...]
    wanted_for: str

    @property
    def missing(self) -> str:
        """What to tell a person who has it not."""
        return (
            f"{self.files[0]} is missing, and {self.wanted_for} will fail: "
            f"install it (apt-get install {self.name}), or put it on PATH"
        )


PROMETHEUS = Package("prometheus", ("prometheus", "promtool"), "tests of the dashboard")
ETCD = Package("etcd-server", ("etcd",), "tests of etcd")
PACKAGES = (PROMETHEUS, ETCD)


def find(package: Package, file: str = "") -> Path | None:
    """Where a file of the package's is, the first if none is named; None: it is not there."""
    name = file or package.files[0]
    on_path = shutil.which(name)
    if on_path:
        return Path(on_path)
    paths = (root / "usr" / "bin" / name for root in (Path("/"), BUILD / package.name))
    return next(filter(Path.is_file, paths), None)


def fetch(package: Package) -> bool:
    """Unpack it below `BUILD`; False where that does not work."""
    BUILD.mkdir(exist_ok=True)
    place = BUILD / package.name
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        try:
            archive = _download(package.name, folder)
            _run("dpkg-deb", "--extract", str(archive), "unpacked", folder=folder)
        except (OSError, subprocess.SubprocessError):
            return False
        shutil.rmtree(place, ignore_errors=True)
        (Path(folder) / "unpacked").rename(place)
    return find(package) is not None


def _download(package: str, folder: str) -> Path:
    """Get the archive: by the system's lists of packages or, where it has none, by own ones."""
    try:
        _run("apt-get", "download", package, folder=folder)
    except subprocess.CalledProcessError:
        lists = Path(folder) / "lists"
        (lists / "partial").mkdir(parents=True)
        apart = ("-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={folder}")
        _run("apt-get", *apart, "update", folder=folder)
        _run("apt-get", *apart, "download", package, folder=folder)
    (archive,) = Path(folder).glob("*.deb")
    return archive


def _run(*command: str, folder: str) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=DOWNLOAD_SECONDS)


def main() -> int:
    """The command line."""
    missing = 0
    for package in PACKAGES:
        if find(package):
            continue
        started = time.monotonic()
        if fetch(package):
            print(
                f"  {package.name}, for {package.wanted_for} … {time.monotonic() - started:.0f} s"
            )
        else:
            print(package.missing, file=sys.stderr)
            missing += 1
    return min(missing, 1)


if __name__ == "__main__":
    sys.exit(main())
