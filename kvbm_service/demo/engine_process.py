"""The engine's side: a process with a real vLLM engine that answers what comes over a socket.

    python -m kvbm_service.demo.engine_process <socket's file descriptor>

The first line that comes is the engine's arguments; `talk.py` has the rest. When the other
side of the socket is gone, for whatever reason, the whole process group ends at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from kvbm_service.demo.process_group import end_group
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


class Line:
    """The socket: lines out from any thread, lines in on a thread of their own."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self._socket = socket.socket(fileno=descriptor)
        self._lines = self._socket.makefile("rb")
        self._encoder = msgspec.json.Encoder()

    def arguments(self) -> dict[str, Any]:
        """The first line."""
        arguments: dict[str, Any] = msgspec.json.decode(self._lines.readline())
        return arguments

    def say(self, message: FromEngine) -> None:
        """Send a line."""
        self._socket.sendall(self._encoder.encode(message) + b"\n")

    def listen(self, heard: Callable[[ToEngine], None]) -> None:
        """Report every line until the other side is gone, and then end everything here."""
        threading.Thread(target=self._listen, args=(heard,), daemon=True).start()

    def _listen(self, heard: Callable[[ToEngine], None]) -> None:
        decoder = msgspec.json.Decoder[ToEngine](ToEngine)
        try:
            for line in self._lines:
                heard(decoder.decode(line))
        finally:  # it may be gone in the midst of a line, or before it has heard everything
            end_group(os.getpgrp())


class Server:
    """Answers lines with one `AsyncLLM`."""

    def __init__(self, engine: Any, line: Line) -> None:
        self._engine = engine
        self._line = line
        self._asks: dict[int, asyncio.Task[None]] = {}

    async def serve(self, lines: asyncio.Queue[ToEngine]) -> None:
        """Work until told to stop."""
        async with asyncio.TaskGroup() as group:
            while not isinstance(message := await lines.get(), Stop):
                if isinstance(message, Abort):
                    if message.id in self._asks:
                        self._asks[message.id].cancel()
                    continue
                task = group.create_task(self._answer(message))
                if isinstance(message, Ask):
                    self._asks[message.id] = task
            for task in self._asks.values():
                task.cancel()

    async def _answer(self, message: Ask | Reset | Call) -> None:
        try:
            self._line.say(await self._work(message))
        except asyncio.CancelledError:
            self._line.say(Refused(message.id, "aborted"))
        except Exception as error:  # noqa: BLE001 - whatever the engine raises is reported
            self._line.say(Refused(message.id, f"{type(error).__name__}: {error}"))
        finally:
            self._asks.pop(message.id, None)

    async def _work(self, message: Ask | Reset | Call) -> FromEngine:
        match message:
            case Ask():
                return await self._ask(message)
            case Reset():
                done = await self._engine.reset_prefix_cache(reset_connector=message.connector)
                return Done(message.id, done)
            case Call():
                arguments = tuple(message.arguments)
                return Done(
                    message.id, await self._engine.collective_rpc(message.method, args=arguments)
                )

    async def _ask(self, ask: Ask) -> Answer:
        from vllm import SamplingParams

        prompt: dict[str, Any] = {"prompt_token_ids": ask.prompt}
        if ask.cache_salt is not None:
            prompt["cache_salt"] = ask.cache_salt
        greedy = SamplingParams(
            temperature=0.0,
            max_tokens=ask.max_tokens,
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
            extra_args={"kv_transfer_params": ask.kv_transfer_params},
        )
        asked = time.perf_counter()
        outputs = self._engine.generate(prompt, greedy, str(ask.id))
        output = await anext(outputs)
        ttft_seconds = time.perf_counter() - asked
        async for output in outputs:  # noqa: B007 - the last one has everything
            pass
        completion = output.outputs[0]
        tokens = list(completion.token_ids)
        chosen = zip(completion.logprobs, tokens, strict=True)
        return Answer(
            id=ask.id,
            tokens=tokens,
            logprobs=[position[token].logprob for position, token in chosen],
            cached_tokens=output.num_cached_tokens or 0,
            ttft_seconds=ttft_seconds,
            seconds=time.perf_counter() - asked,
            kv_transfer_params=output.kv_transfer_params,
        )


async def run(line: Line) -> None:
    """Start the engine, serve, stop it."""
    loop = asyncio.get_running_loop()
    lines: asyncio.Queue[ToEngine] = asyncio.Queue()
    arguments = line.arguments()

    def heard(message: ToEngine) -> None:
        loop.call_soon_threadsafe(lines.put_nowait, message)

    line.listen(heard)
    line.say(Stage(0, "importing vLLM"))
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    if transfer := arguments.pop("kv_transfer_config", None):
        arguments["kv_transfer_config"] = KVTransferConfig(**transfer)
    line.say(Stage(0, "loading the model"))
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    try:
        line.say(Stage(0, "ready", ready=True))
        await Server(engine, line).serve(lines)
    finally:
        engine.shutdown()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the starter's to interpret
    asyncio.run(run(Line(int(sys.argv[1]))))
