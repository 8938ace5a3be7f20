"""A NIXL agent that moves blocks between memory and one file.

Which queue NIXL puts under its POSIX backend matters when a transfer fails. One that is not
DONE may still be going on. Linux's AIO, NIXL's own first choice, waits for what is in flight
when its context is destroyed: so destroying the agent proves that nothing moves any more.
io_uring goes on by itself, and is as fast as AIO here; some containers forbid it.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from nixl._api import nixl_agent, nixl_agent_config

from kvbm_service.adapters.bounce import Memory
from kvbm_service.adapters.disk_file import DiskFile
from kvbm_service.adapters.mover import Indices
from kvbm_service.adapters.nixl_reader import NIXL_ERRORS, destroy
from kvbm_service.errors import LayoutError

Operation = Literal["READ", "WRITE"]
State = Literal["PROC", "DONE", "ERR"]

_POSIX_QUEUES = ("use_aio", "use_uring", "use_posix_aio")
"""In the order in which they are tried."""


class FileTransfer:
    """What `DiskAgent.start` started."""

    def __init__(self, handle: Any, state: State) -> None:
        self.handle = handle
        self.state: State = state


class DiskAgent:
    """Transfers between rows of `memories` and slots of `file`, each as long as a row.

    Not for several threads at a time. At most `in_flight` blocks are under way.

    Raises:
        LayoutError: the backend does not start.
    """

    def __init__(
        self,
        backend: str,
        file: DiskFile,
        slots: int,
        row_bytes: int,
        memories: Sequence[Memory],
        in_flight: int,
    ) -> None:
        self._start_backend(backend, str(in_flight))
        self._prepared: list[Any] = []
        self._agent.register_memory([(0, file.nbytes, file.fd, "")], "FILE")
        self._file = self._prepare(
            self._agent.name, (0, row_bytes, file.fd, row_bytes, slots), "FILE"
        )
        self._memories = {memory: self._register(memory, row_bytes) for memory in memories}

    def start(
        self, operation: Operation, memory: Memory, rows: Indices, slots: Indices
    ) -> FileTransfer:
        """Start moving blocks between these rows and these slots."""
        handle = self._agent.make_prepped_xfer(
            operation,
            self._memories[memory], rows.astype(np.int32), self._file, slots.astype(np.int32),
        )  # fmt: skip
        return FileTransfer(handle, self._ask(self._agent.transfer, handle))

    def poll(self, transfer: FileTransfer) -> State:
        """How the transfer is now. Once DONE, it is over; once ERR, until `destroy`, it is not."""
        if transfer.state == "PROC":
            transfer.state = self._ask(self._agent.check_xfer_state, transfer.handle)
        if transfer.state == "DONE":
            self._release(transfer)
        return transfer.state

    def destroy(self, failed: Sequence[FileTransfer] = ()) -> None:
        """Let go of everything. All transfers have ended, these with ERR.

        With `quiet_when_destroyed`, nothing of theirs happens after this.
        """
        for transfer in failed:
            self._release(transfer)
        for handle in self._prepared:
            handle.release()
            handle._agent = None
        self._prepared.clear()
        destroy(self._agent)

    def _ask(self, step: Any, handle: Any) -> State:
        try:
            state: State = step(handle)
        except NIXL_ERRORS:
            return "ERR"
        return state

    def _release(self, transfer: FileTransfer) -> None:
        if transfer.handle is not None:
            transfer.handle.release()
            transfer.handle._agent = None
            transfer.handle = None

    def _start_backend(self, backend: str, in_flight: str) -> None:
        queues = [{queue: "true"} for queue in _POSIX_QUEUES] if backend == "POSIX" else [{}]
        reasons: list[str] = []
        for queue in queues:
            config = nixl_agent_config(enable_prog_thread=False, backends=[])
            self._agent = nixl_agent(f"kvbm-disk-{uuid.uuid4().hex}", config)
            sizes = {"ios_pool_size": in_flight, "kernel_queue_size": in_flight} if queue else {}
            try:
                self._agent.create_backend(backend, queue | sizes)
            except NIXL_ERRORS as error:
                reasons.append(str(error))
                continue
            self.quiet_when_destroyed = "use_aio" in queue
            return
        raise LayoutError(
            f"NIXL's {backend} backend does not start ({', '.join(reasons)}): "
            "set KVBM_DISK_BACKEND=POSIX, and see that fs.aio-max-nr is not used up"
        )

    def _register(self, memory: Memory, row_bytes: int) -> Any:
        length = (memory.rows - 1) * memory.stride + row_bytes
        self._agent.register_memory([(memory.address, length, 0, "")], "DRAM")
        row = (memory.address, row_bytes, 0, memory.stride, memory.rows)
        return self._prepare("NIXL_INIT_AGENT", row, "DRAM")

    def _prepare(self, agent: str, row: tuple[int, ...], kind: str) -> Any:
        rows: npt.NDArray[np.uint64] = np.array([row], np.uint64)
        handle = self._agent.prep_xfer_dlist(agent, rows, kind)
        self._prepared.append(handle)
        return handle
