"""A real vLLM engine in processes of its own, to be asked, watched, killed and stopped.

    with Engine(EngineOptions(model=make_model(path), log=folder / "a.log")) as engine:
        engine.wait_ready()
        answer = engine.ask([1, 2, 3], max_tokens=4)

The engine's processes form a group: they end together, also when the program that started them
is killed. vLLM itself is only imported there, never here.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from kvbm_service.demo.process_group import end_group, members
from kvbm_service.demo.talk import (
    Abort,
    Answer,
    Ask,
    Call,
    Done,
    FromEngine,
    Refused,
    Reset,
    Stage,
    Stop,
    ToEngine,
)
from kvbm_service.errors import KvbmError

R = TypeVar("R")

BLOCK_TOKENS = 32
"""vLLM's CPU backend wants multiples of 32."""
START_SECONDS = 300.0
"""A start takes about 20 s on a quiet machine; two cores shared with others are not quiet."""
ANSWER_SECONDS = 120.0
STOP_SECONDS = 20.0
GONE_SECONDS = 5.0
"""For Python's resource tracker to tidy up; it takes milliseconds."""
PROGRESS_SECONDS = 0.2
LOG_TAIL_LINES = 20
RAISED = re.compile(r"^(?:\(.*?\) ERROR .*?\] )?((?:\w+\.)*[A-Z]\w+: .+)$", re.MULTILINE)
"""The last line of a traceback, plain or logged: the cause is often not at the log's end."""


class EngineFailed(KvbmError):
    """The engine did not start, has ended, or refused; carries the last lines of its log."""


@dataclass(frozen=True)
class EngineOptions:
    """How to start an engine."""

    model: Path
    """A folder that `make_model` made."""
    log: Path
    """Where the engine's output goes; replaced."""
    device_blocks: int = 256
    """Size of the device pool, in blocks of `BLOCK_TOKENS`."""
    connector: Mapping[str, object] | None = None
    """`kv_connector_extra_config`; None: no connector at all."""
    cores: str | None = None
    """One list of cores per rank, as in `0-1|2-3`; None: see `share_cores`."""
    ranks: int = 1
    """Tensor parallel size."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables on top of the inherited ones."""
    vllm: Path | None = None
    """A folder with another release of vLLM, which goes before the installed one."""
    arguments: Mapping[str, object] = field(default_factory=dict)
    """More arguments of `AsyncEngineArgs`; they win over ours."""


class Engine:
    """A running engine. All methods may be called from any thread."""

    def __init__(self, options: EngineOptions) -> None:
        """Start the processes and return at once; `wait_ready` waits."""
        self.options = options
        self._ids = itertools.count(1)
        self._waiting: dict[int, Future[Any]] = {}
        self._lock = threading.Lock()
        self._ready: Future[None] = Future()
        self._stage = "starting"
        self._ended = False
        self._encoder = msgspec.json.Encoder()
        self._socket, theirs = socket.socketpair()
        options.log.parent.mkdir(parents=True, exist_ok=True)
        with theirs, options.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kvbm_service.demo.engine_process", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=engine_environment(options),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._send(engine_arguments(options))
        self._reader = threading.Thread(target=self._read, name="engine-reader", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The front end's process, and the id of the group that all its processes are in."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the front end runs."""
        return self._process.poll() is None

    def wait_ready(
        self,
        timeout_seconds: float = START_SECONDS,
        progress: Callable[[str], None] = lambda stage: None,
    ) -> Self:
        """Wait until it answers; `progress` is told each new stage of the start.

        Raises:
            EngineFailed: it ended instead, or was not ready in time.
        """
        deadline = time.monotonic() + timeout_seconds
        told = None
        while True:
            if self._stage != told:
                told = self._stage
                progress(told)
            with contextlib.suppress(TimeoutError):
                self._ready.result(PROGRESS_SECONDS)
                progress(self._stage)
                return self
            if time.monotonic() > deadline:
                raise self._failure(f"not ready after {timeout_seconds:.0f} s ({self._stage})")

    def submit(
        self,
        prompt: Sequence[int],
        max_tokens: int = 8,
        cache_salt: str | None = None,
        kv_transfer_params: dict[str, Any] | None = None,
    ) -> Future[Answer]:
        """Ask, and go on. `asyncio.wrap_future` makes it awaitable; cancelling it aborts.

        The future raises EngineFailed when the engine refuses or ends.
        """
        number = next(self._ids)
        ask = Ask(number, list(prompt), max_tokens, cache_salt, kv_transfer_params)
        future: Future[Answer] = self._request(ask)
        future.add_done_callback(lambda done: self._abort(number) if done.cancelled() else None)
        return future

    def ask(
        self,
        prompt: Sequence[int],
        max_tokens: int = 8,
        cache_salt: str | None = None,
        timeout_seconds: float = ANSWER_SECONDS,
    ) -> Answer:
        """Ask, and wait for the answer.

        Raises:
            EngineFailed: it refused, has ended, or took too long.
        """
        return self._wait(self.submit(prompt, max_tokens, cache_salt), timeout_seconds)

    def reset_prefix_cache(self, connector: bool = False) -> bool:
        """Empty the device pool (and, if `connector`, its tiers). False: something is running.

        Raises:
            EngineFailed: it refused, has ended, or took too long.
        """
        number = next(self._ids)
        return bool(self._wait(self._request(Reset(number, connector)), ANSWER_SECONDS))

    def call_workers(self, method: str, *arguments: object) -> list[Any]:
        """Call a method of each rank's worker; returns one result per rank.

        Raises:
            EngineFailed: it refused, has ended, or took too long.
        """
        call = Call(next(self._ids), method, list(arguments))
        results: list[Any] = self._wait(self._request(call), ANSWER_SECONDS)
        return results

    def stop(self) -> None:
        """Stop cleanly, as an operator would; what has not ended in time is killed."""
        with contextlib.suppress(OSError):
            self._send(Stop(0))
            self._process.wait(STOP_SECONDS)
        self.kill()

    def kill(self) -> None:
        """Kill -9 the front end and everything it started; returns when they are gone."""
        end_group(self.pid)
        self._process.wait()
        deadline = time.monotonic() + GONE_SECONDS
        while members(self.pid) and time.monotonic() < deadline:
            time.sleep(0.005)
        self._reader.join()
        self._socket.close()

    def what_went_wrong(self) -> str:
        """The errors that its log names, and its last lines."""
        return what_a_log_tells(self.options.log)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop() if kind is None else self.kill()

    def _request(self, message: Ask | Reset | Call) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if self._ended:
                future.set_exception(self._failure("has ended"))
                return future
            self._waiting[message.id] = future
        with contextlib.suppress(OSError):  # it has ended: the reader tells every future
            self._send(message)
        return future

    def _wait(self, future: Future[R], timeout_seconds: float) -> R:
        try:
            return future.result(timeout_seconds)
        except TimeoutError:
            future.cancel()
            raise self._failure(f"no answer after {timeout_seconds:.0f} s") from None

    def _abort(self, number: int) -> None:
        with contextlib.suppress(OSError):
            self._send(Abort(number))

    def _send(self, message: ToEngine | dict[str, object]) -> None:
        line = self._encoder.encode(message) + b"\n"
        with self._lock:
            self._socket.sendall(line)

    def _read(self) -> None:
        decoder = msgspec.json.Decoder[FromEngine](FromEngine)
        with contextlib.suppress(OSError), self._socket.makefile("rb") as lines:
            for line in lines:
                self._hear(decoder.decode(line))
        with self._lock:
            self._ended = True
            left = [self._ready, *self._waiting.values()]
            self._waiting.clear()
        for future in left:
            _settle(future, error=self._failure("has ended"))

    def _hear(self, message: FromEngine) -> None:
        if isinstance(message, Stage):
            self._stage = message.what
            if message.ready:
                _settle(self._ready)
            return
        with self._lock:
            future = self._waiting.pop(message.id, None)
        if future is None:
            return
        match message:
            case Answer():
                _settle(future, message)
            case Done():
                _settle(future, message.result)
            case Refused():
                _settle(future, error=self._failure(message.error))

    def _failure(self, what: str) -> EngineFailed:
        return EngineFailed(f"engine {self.options.log.stem}: {what}\n{self.what_went_wrong()}")


def what_a_log_tells(path: Path) -> str:
    """The errors that an engine's log names, and its last lines."""
    log = path.read_text(errors="replace")
    errors = dict.fromkeys(RAISED.findall(log))
    last = log.splitlines()[-LOG_TAIL_LINES:]
    return "\n".join([*errors, f"The end of {path}:", *last])


def share_cores(engines: int = 1, ranks: int = 1) -> list[str]:
    """Divide the cores we may use among `engines`, in the form of `EngineOptions.cores`.

    One core is left to everybody else where there are enough: OpenMP's threads spin while they
    wait for each other, and one that has to share its core holds up all of them. Where there are
    too few, each rank gets one core, which needs no waiting.
    """
    cores = sorted(os.sched_getaffinity(0))
    shares = engines * ranks
    each = max(1, (len(cores) - 1) // shares)
    turn = itertools.cycle(cores)
    lists = [",".join(str(next(turn)) for _ in range(each)) for _ in range(shares)]
    return ["|".join(lists[at : at + ranks]) for at in range(0, shares, ranks)]


def engine_arguments(options: EngineOptions) -> dict[str, object]:
    """The arguments of `AsyncEngineArgs`."""
    config = json.loads((options.model / "config.json").read_text())
    arguments: dict[str, object] = {
        "model": str(options.model),
        "dtype": config["dtype"],  # by itself vLLM would make bfloat16 of float32
        "enforce_eager": True,
        "block_size": BLOCK_TOKENS,
        "num_gpu_blocks_override": options.device_blocks,
        "max_model_len": min(
            config["max_position_embeddings"], (options.device_blocks - 1) * BLOCK_TOKENS
        ),
        "max_num_seqs": 16,
        "tensor_parallel_size": options.ranks,
        "disable_log_stats": True,
        "seed": 0,
    }
    if options.connector is not None:
        arguments["kv_transfer_config"] = {
            "kv_connector": "KvbmConnector",
            "kv_connector_module_path": "kvbm_connectors.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": dict(options.connector),
        }
    return arguments | dict(options.arguments)


def engine_environment(options: EngineOptions) -> dict[str, str]:
    """The environment of the engine's processes: no network but loopback, nothing in the home."""
    state = options.model.parent / "vllm-state"
    environment = dict(os.environ) | {
        "DO_NOT_TRACK": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HOME": str(state),
        "HF_HUB_OFFLINE": "1",
        "KVBM_HOST_CACHE_DIR": "none",  # nothing stays behind, unless someone wants it to
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_COMPILE_DISABLE": "1",  # it would need a C++ compiler, and 25 s at the first prompt
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(state),
        "VLLM_CONFIG_ROOT": str(state),
        "VLLM_CPU_KVCACHE_SPACE": str(_pool_gib(options)),
        "VLLM_CPU_OMP_THREADS_BIND": options.cores or share_cores(1, options.ranks)[0],
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if options.vllm is not None:
        paths = [str(options.vllm), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment | dict(options.environment)


def _pool_gib(options: EngineOptions) -> int:
    """Whole GiB, the unit of vLLM's setting, that hold the device pool."""
    config = json.loads((options.model / "config.json").read_text())
    itemsize = {"float32": 4, "bfloat16": 2}[config["dtype"]]
    heads: int = config["num_hidden_layers"] * config["num_key_value_heads"]
    per_token: int = 2 * heads * config["head_dim"] * itemsize
    return math.ceil(options.device_blocks * BLOCK_TOKENS * per_token / (1 << 30))


def _settle(future: Future[Any], result: object = None, error: Exception | None = None) -> None:
    """Resolve a future, unless it was cancelled or settled before."""
    with contextlib.suppress(InvalidStateError):
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)
