"""What a launch script starts: the command and the environment of each engine. Starts nothing."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from kvbm_service.demo.engine import (
    BLOCK_TOKENS,
    EngineOptions,
    engine_arguments,
    engine_environment,
    share_cores,
)

HOST = "127.0.0.1"
GUIDES_MODEL = "Qwen/Qwen3-0.6B"
TEMPLATE = Path(__file__).with_name("chat_template.jinja")
"""For the model with random weights, which has none of its own."""
TRIAL_DEVICE_BLOCKS = 512
"""The device pool of an engine on a CPU, in blocks of 32 tokens."""
SIZES = (
    "DYN_KVBM_CPU_CACHE_GB",
    "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS",
    "DYN_KVBM_DISK_CACHE_GB",
    "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS",
)
"""Of which one has to be set."""
CPU_ENVIRONMENT = {
    "KVBM_HOST_CACHE_DIR": "none",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
}
"""For a model of somebody's own on a CPU: no compiler is needed, and no memory stays taken."""
HOST_TIER_GB = "4"
TRIAL_HOST_TIER_GB = "0.5"

KV_ROLES = {"prefill": "kv_producer", "decode": "kv_consumer", "engine": "kv_both"}
CONNECTORS = ("kvbm", "nixl", "none")


@dataclass(frozen=True)
class Planned:
    """An engine that is to be started."""

    name: str
    role: str
    """Of KV_ROLES."""
    url: str
    command: Sequence[str]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Wanted:
    """What was asked for."""

    engines: int
    prefill: int
    decode: int
    model: str
    """What is served; empty: the guides' model, or one with random weights on a CPU."""
    ranks: int
    connector: str
    extra: Sequence[str]
    """Arguments for vLLM, which win over ours."""

    @property
    def roles(self) -> list[tuple[str, str]]:
        """Name and role of each engine."""
        counts = {"prefill": self.prefill, "decode": self.decode, "engine": self.engines}
        return [
            (f"{role}-{number}", role)
            for role, count in counts.items()
            for number in range(1, count + 1)
        ]


def on_gpus(wanted: Wanted, devices: Sequence[str], given: Mapping[str, str]) -> list[Planned]:
    """Engines with `ranks` of `devices` each. `given`: the environment we were called in."""
    model = wanted.model or GUIDES_MODEL
    turn = iter(devices)
    planned = []
    for (name, role), port in zip(wanted.roles, free_ports(len(wanted.roles)), strict=True):
        mine = ",".join(next(turn) for _ in range(wanted.ranks))
        arguments = {"model": model, "tensor_parallel_size": wanted.ranks}
        environment = {"CUDA_VISIBLE_DEVICES": mine} | _tiers(given, HOST_TIER_GB)
        planned.append(_engine(wanted, name, role, port, arguments, environment, given))
    return planned


def on_cpu(
    wanted: Wanted, trial: Path | None, logs: Path, given: Mapping[str, str]
) -> list[Planned]:
    """Engines of vLLM's CPU build that share the cores; `trial`: a model that `make_model` made,
    where none was asked for.
    """
    roles = wanted.roles
    cores = share_cores(len(roles), wanted.ranks)
    planned = []
    for (name, role), port, mine in zip(roles, free_ports(len(roles)), cores, strict=True):
        if trial is None:
            environment = dict(CPU_ENVIRONMENT)
            arguments: dict[str, object] = {"model": wanted.model, "enforce_eager": True}
            arguments |= {"block_size": BLOCK_TOKENS, "tensor_parallel_size": wanted.ranks}
        else:
            options = EngineOptions(
                trial, logs / f"{name}.log", TRIAL_DEVICE_BLOCKS, ranks=wanted.ranks
            )
            environment = engine_environment(options)
            arguments = engine_arguments(options)
            arguments |= {"served_model_name": GUIDES_MODEL, "chat_template": str(TEMPLATE)}
        environment["VLLM_CPU_OMP_THREADS_BIND"] = mine
        environment = {key: value for key, value in environment.items() if key not in given}
        environment |= _tiers(given, TRIAL_HOST_TIER_GB)
        planned.append(_engine(wanted, name, role, port, arguments, environment, given))
    return planned


def _engine(
    wanted: Wanted,
    name: str,
    role: str,
    port: int,
    arguments: dict[str, object],
    environment: dict[str, str],
    given: Mapping[str, str],
) -> Planned:
    url = f"http://{HOST}:{port}"
    arguments = arguments | {"host": HOST, "port": port, "enable_prompt_tokens_details": True}
    environment = environment | {"KVBM_ENGINE_URL": url} | _node_name(name, given)
    if transfer := _transfer(wanted.connector, role):
        arguments["kv_transfer_config"] = json.dumps(transfer)
    if wanted.connector == "nixl":
        environment["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(free_ports(1)[0])
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += [*_flags(arguments), *wanted.extra]
    return Planned(name, role, url, command, environment)


def _node_name(name: str, given: Mapping[str, str]) -> dict[str, str]:
    """In a cluster of other people's, ours must not meet a namesake."""
    if prefix := given.get("KVBM_NODE_NAME"):
        return {"KVBM_NODE_NAME": f"{prefix}-{name}"}
    return {} if given.get("KVBM_NATS_URL") else {"KVBM_NODE_NAME": name}


def _transfer(connector: str, role: str) -> dict[str, object]:
    if connector == "none":
        return {}
    if connector == "nixl":
        return {"kv_connector": "NixlConnector", "kv_role": KV_ROLES[role]}
    return {
        "kv_connector": "KvbmConnector",
        "kv_connector_module_path": "kvbm_connectors.vllm",
        "kv_role": KV_ROLES[role],
        "kv_load_failure_policy": "recompute",
    }


def _flags(arguments: Mapping[str, object]) -> list[str]:
    flags: list[str] = []
    for name, value in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        flags += [flag] if value is True else [flag, str(value)]
    return flags


def _tiers(given: Mapping[str, str], host_gb: str) -> dict[str, str]:
    """What has to be added for an engine to have a tier at all."""
    return {} if any(given.get(size) for size in SIZES) else {SIZES[0]: host_gb}


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on now."""
    with ExitStack() as open_ones:
        found = []
        for _ in range(count):
            listener = open_ones.enter_context(socket.socket())
            listener.bind((HOST, 0))
            found.append(listener.getsockname()[1])
        return found
