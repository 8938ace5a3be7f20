"""The owner of a slab, in a process of its own: obeys one JSON command per line of stdin."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from kvbm_service.adapters.mover import DevicePool, RemoteSlab
from kvbm_service.adapters.nixl_mover import NixlMover
from tests.contracts.mover_rank import Rank, blocks

PROGRESS_SECONDS = 0.002

LENT_SECONDS = 0.002
"""How long each time, where a block is lent again and again."""


class OwnerProcess:
    """What a test sees of it; has the same verbs as a `Rank` for what tests do to owners."""

    def __init__(self, layout: str, *, verify: bool, device: str = "cpu") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, layout, str(int(verify)), device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "NIXL_LOG_LEVEL": "FATAL"},
        )
        said = self._hear()
        said["agent_metadata"] = base64.b64decode(said["agent_metadata"])
        said["parts"] = tuple(said["parts"])
        *pool, regions = said["pool"]
        said["pool"] = DevicePool(*pool, tuple((at, stride) for at, stride in regions))
        self.as_peer = RemoteSlab(**said)

    def save(self, seed: int, slots: list[int], device: list[int], fill: int = 1) -> None:
        self._ask("save", seed, slots, device, fill)

    def block(self, number: int) -> bytes:
        return bytes.fromhex(self._ask("block", number))

    def stamp(self, slot: int, name: tuple[int, int], fill: int) -> None:
        self._ask("stamp", slot, name, fill)

    def flip_a_bit(self, slot: int) -> None:
        self._ask("flip_a_bit", slot)

    def fill_pool(self, seed: int) -> None:
        self._ask("fill_pool", seed)

    def lend(self, device: list[int], op: int) -> None:
        self._ask("lend", device, op)

    def unlend(self, device: list[int], op: int) -> None:
        self._ask("unlend", device, op)

    def write(self, number: int, octet: int) -> None:
        self._ask("write", number, octet)

    def keep_reusing(self, number: int) -> None:
        """From now on lend one device block again and again, always with other bytes."""
        self._ask("keep_reusing", number)

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        """As `kill`; may be called again."""
        self.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()

    def _ask(self, verb: str, *args: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([verb, *args]).encode() + b"\n")
        self._process.stdin.flush()
        return self._hear()

    def _hear(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the owner has died"
        return json.loads(line)


class LocalOwner:
    """The same, in this process: for movers that cannot leave it."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self.as_peer = rank.as_peer
        self.block = rank.block
        self.stamp = rank.stamp
        self.flip_a_bit = rank.flip_a_bit
        self.fill_pool = rank.fill_pool
        self.lend = rank.lend
        self.unlend = rank.unlend
        self.write = rank.write
        self._reusing: threading.Thread | None = None
        self._open = True

    def save(self, seed: int, slots: list[int], device: list[int], fill: int = 1) -> None:
        self._rank.fill_pool(seed)
        self._rank.mover.save(blocks(slots, device, fill))

    def keep_reusing(self, number: int) -> None:
        self._reusing = threading.Thread(target=self._keep_reusing, args=(number,), daemon=True)
        self._reusing.start()

    def _keep_reusing(self, number: int) -> None:
        for op in itertools.count(2, 2):
            if not self._open:
                return
            self._rank.write(number, octet_under(op))
            self._rank.lend([number], op)
            time.sleep(LENT_SECONDS)
            self._rank.unlend([number], op + 1)

    def close(self) -> None:
        if self._open:
            self._open = False
            if self._reusing is not None:
                self._reusing.join()
            self._rank.close()


def octet_under(op: int) -> int:
    """What all bytes of a block that is reused are while it is lent under this op."""
    return op // 2 % 251


def main() -> None:
    layout, verify, device = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print is not an answer
    owner = LocalOwner(Rank(NixlMover, layout, verify=bool(int(verify)), device=device))
    mover = owner._rank.mover
    said = owner.as_peer._asdict()
    said["agent_metadata"] = base64.b64encode(said["agent_metadata"]).decode()
    print(json.dumps(said), file=out)
    while True:
        mover.progress()
        ready, _, _ = select.select([sys.stdin], [], [], PROGRESS_SECONDS)
        if ready:
            line = sys.stdin.readline()
            if not line:
                return
            verb, *args = json.loads(line)
            answer = getattr(owner, verb)(*args)
            print(json.dumps(answer.hex() if isinstance(answer, bytes) else answer), file=out)


if __name__ == "__main__":
    main()
