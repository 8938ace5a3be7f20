"""Engines in processes of their own, so that they can be killed like real ones.

    with Lives(folder) as lives:
        life = lives.begin("save_for_ever", settings, seed=3)
        life.hear()
        life.kill()
        assert lives.begin("tell", settings).hear()["host"] > 0

Run as a module, this is the process that they are forked from: importing vLLM takes seconds,
forking milliseconds. Lives speak in lines of JSON, one life at a time, and end with whoever
started them.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from vllm.config import ModelConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvbm_schemas.block import BlockHash, Tier
from tests.connectors.computation import Digests
from tests.connectors.engine import BLOCK, Engine, Shape, prompt
from tests.connectors.stand_in import make_model

PROMPTS = 48
LENGTHS = (21, 33, 41, 25)
"""Of the prompts, in turn."""
AT_ONCE = 3
LARGE = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=2048, dtype=torch.float32)
"""Blocks of 128 KiB, so that much of the time goes into copying them."""
PATIENCE_SECONDS = 120.0
"""Importing vLLM took more than a minute on a machine with ten times the work it can do."""
PR_SET_PDEATHSIG = 1


class Life:
    """One process with one engine."""

    def __init__(self, lives: Lives, pid: int) -> None:
        self._lives = lives
        self.pid = pid

    def hear(self) -> dict[str, Any]:
        """The next thing that it says. What it failed of fails the test."""
        said = self._lives.hear()
        assert "failed" not in said, said["failed"]
        return said

    def kill(self) -> None:
        """kill -9, and wait for the end."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> None:
        """Wait for the end."""
        try:
            process = os.pidfd_open(self.pid)
        except ProcessLookupError:
            process = None
        if process is not None:
            ended, _, _ = select.select([process], [], [], PATIENCE_SECONDS)
            os.close(process)
            assert ended, "it does not end"
        self._lives.alive.discard(self)


class Lives:
    """Makes lives, one at a time."""

    def __init__(self, model: Path) -> None:
        self._forge = subprocess.Popen(
            [sys.executable, "-m", __name__, str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self._unread = b""
        self.alive: set[Life] = set()

    def begin(self, deed: str, settings: dict[str, Any], **options: Any) -> Life:
        """A life whose engine has the shape `settings`, and that does `deed`, a function below."""
        assert self._forge.stdin is not None
        order = {"deed": deed, "settings": settings, "options": options}
        self._forge.stdin.write(json.dumps(order).encode() + b"\n")
        self._forge.stdin.flush()
        while "pid" not in (said := self.hear()):
            pass  # the one before was killed before anyone listened to this
        life = Life(self, said["pid"])
        self.alive.add(life)
        return life

    def hear(self) -> dict[str, Any]:
        """The next thing that any of them says."""
        while not (line := self._next_line()).startswith(b"{"):
            pass  # older releases of vLLM log here, too
        said: dict[str, Any] = json.loads(line)
        return said

    def _next_line(self) -> bytes:
        assert self._forge.stdout is not None
        while b"\n" not in self._unread:
            speech, _, _ = select.select([self._forge.stdout], [], [], PATIENCE_SECONDS)
            assert speech, self._silence()
            heard = os.read(self._forge.stdout.fileno(), 1 << 16)
            assert heard, "the forge has ended"
            self._unread += heard
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _silence(self) -> str:
        """Have all of them write to stderr what their threads are doing."""
        forge = self._forge.pid
        forked = Path(f"/proc/{forge}/task/{forge}/children").read_text().split()
        for pid in (forge, *map(int, forked)):
            os.kill(pid, signal.SIGUSR1)
        time.sleep(1)
        return f"nothing was said; stderr tells what {forge} and its children {forked} are doing"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for life in list(self.alive):
            life.kill()
        self._forge.communicate()


# -- what a life may do ----------------------------------------------------------------------


def save_for_ever(engine: Engine, seed: int) -> NoReturn:
    """Say what was found and is right; then compute and load for ever, and say once that the
    tiers are full.
    """
    say(**check_claims(engine))
    dice = random.Random(seed)
    tiers = engine.core.tiers
    assert tiers.disk is not None
    full = False
    while True:
        for number in dice.sample(range(PROMPTS), AT_ONCE):
            engine.submit(text(number))
        engine.run()
        engine.forget_device()
        if not full and all(pool.used == pool.capacity for pool in (tiers.host, tiers.disk)):
            full = True
            say(full=True)


def tell(engine: Engine) -> None:
    """Say what was found and is right, and how much can be loaded of it; end in good order."""
    found = check_claims(engine)
    tiers = engine.core.tiers
    held = {*tiers.host.blocks(), *(tiers.disk.blocks() if tiers.disk is not None else ())}
    loaded = sum(engine.ask(tokens).loaded for tokens in _texts_that_begin(engine, held))
    engine.close()
    say(**found, loaded=loaded)


def _texts_that_begin(engine: Engine, held: set[BlockHash]) -> list[list[int]]:
    """The prompts whose first block is one of these."""
    texts = []
    for number in range(PROMPTS):
        asked = engine.submit(text(number))
        engine.abort(asked)
        if asked.names[0] in held:
            texts.append(text(number))
    return texts


def text(number: int) -> list[int]:
    """The prompts of all lives."""
    return prompt(LENGTHS[number % len(LENGTHS)], number)


def check_claims(engine: Engine) -> dict[str, int]:
    """Read every block that the engine believes to have, and compare its bytes with what a
    computation writes. Returns how many there are, by tier.
    """
    tiers = [tier for tier in (Tier.HOST, Tier.DISK) if engine.core.tiers.has(tier)]
    found = {tier: engine.core.tiers.pool(tier).blocks() for tier in tiers}
    computed = _computed(engine)
    for tier, names in found.items():
        pool = engine.core.tiers.pool(tier)
        for name in names:
            slots = pool.pin([name])
            for rank in engine.ranks:
                assert rank.read(tier, name, slots[0], pool.fills(slots)[0], to=1)
                assert not rank.wrong([1], computed[name]), f"a wrong block in {tier}"
            pool.unpin(slots)
    return {str(tier): len(names) for tier, names in found.items()}


def _computed(engine: Engine) -> dict[BlockHash, Digests]:
    """What is to be in each block of the prompts."""
    content = {}
    for number in range(PROMPTS):
        asked = engine.submit(text(number))
        engine.abort(asked)
        digests = asked.text.digests(asked.text.prompt_length)
        for index, name in enumerate(asked.names):
            content[name] = digests[index * BLOCK : (index + 1) * BLOCK]
    engine.run()
    return content


# -- inside ------------------------------------------------------------------------------------


_mouth = 1


def say(**what: Any) -> None:
    """Say a line to whoever holds the forge."""
    os.write(_mouth, json.dumps(what).encode() + b"\n")


def _live(model: ModelConfig, order: dict[str, Any], parent: int) -> NoReturn:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    try:
        say(pid=os.getpid())
        engine = Engine(model, Shape(specs=(LARGE,), **order["settings"]))
        globals()[order["deed"]](engine, **order["options"])
    except BaseException:  # noqa: BLE001 - told to the test, whatever it is
        say(failed=traceback.format_exc())
        os._exit(1)
    os._exit(0)


def _practise(model: ModelConfig, disk: Path) -> None:
    """Have everything imported and compiled that every life would do again."""
    extra = {
        "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS": 8,
        "DYN_KVBM_DISK_CACHE_DIR": str(disk),
        "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": "true",
    }
    engine = Engine(model, Shape(slots=8, extra=extra))
    engine.ask(text(0))
    check_claims(engine)
    engine.close()


def main() -> None:
    """Fork a life at each line of stdin."""
    global _mouth
    _mouth = os.dup(1)
    os.dup2(2, 1)  # whatever else is printed is no speech
    faulthandler.register(signal.SIGUSR1)  # inherited by all lives
    folder = Path(sys.argv[1])
    model = make_model(folder)
    _practise(model, folder / "practice")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
    parent = os.getpid()
    for line in sys.stdin:
        if os.fork() == 0:
            _live(model, json.loads(line), parent)


if __name__ == "__main__":
    main()
