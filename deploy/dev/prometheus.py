"""Finds the Prometheus that the dashboard is tested with, or fetches it into build/.

    python3 deploy/dev/prometheus.py    silent if it is there; one line otherwise

Prometheus is no Python package. Where there is none on PATH, Debian's package is unpacked into
`build/prometheus`, and nothing is installed. Uses the standard library only.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
UNPACKED = ROOT / "build" / "prometheus"
MISSING = (
    "Prometheus is missing, and tests of the dashboard will fail: "
    "install it (apt-get install prometheus), or put it on PATH"
)
DOWNLOAD_SECONDS = 300


def find(program: str = "prometheus") -> Path | None:
    """Where a program of Prometheus' is (`prometheus`, `promtool`), if it is there."""
    found = shutil.which(program) or shutil.which(program, path=UNPACKED / "usr" / "bin")
    return Path(found) if found else None


def fetch() -> bool:
    """Unpack Debian's package into `UNPACKED`; False where that does not work."""
    UNPACKED.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=UNPACKED.parent) as folder:
        try:
            _run("apt-get", "download", "prometheus", folder=folder)
            (package,) = Path(folder).glob("*.deb")
            _run("dpkg-deb", "--extract", str(package), "unpacked", folder=folder)
        except (OSError, subprocess.SubprocessError):
            return False
        shutil.rmtree(UNPACKED, ignore_errors=True)
        (Path(folder) / "unpacked").rename(UNPACKED)
    return find() is not None


def _run(*command: str, folder: str) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=DOWNLOAD_SECONDS)


def main() -> int:
    """The command line."""
    if find():
        return 0
    started = time.monotonic()
    if fetch():
        print(f"  Prometheus, for tests of the dashboard … {time.monotonic() - started:.0f} s")
        return 0
    print(MISSING, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
