"""What TensorRT-LLM's arguments and its KV pool say: what is refused, who may share blocks."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kvbm_connectors import identity
from kvbm_schemas.subjects import Scope
from kvbm_service.errors import LayoutError, SettingError
from kvbm_service.settings import Settings

if TYPE_CHECKING:
    import torch

DEFAULT_BLOCK_TOKENS = 32
"""TensorRT-LLM's own default, for releases whose arguments do not say it."""

REFUSED: dict[str, tuple[object, str]] = {
    "pipeline_parallel_size": (1, "set it to 1: TensorRT-LLM's connectors know no pipelines"),
    "context_parallel_size": (1, "set it to 1: blocks that ranks share out cannot be cached"),
    "enable_attention_dp": (False, "set it to false: every rank would need a leader of its own"),
    "max_beam_width": (1, "set it to 1: beams share blocks in ways that cannot be followed"),
}
"""Arguments by the one value that can be served, and why."""

REFUSED_OF_CACHE: dict[str, tuple[object, str]] = {
    "enable_partial_reuse": (
        False,
        'set "enable_partial_reuse: false" under kv_cache_config, or fewer blocks come back',
    ),
    "enable_block_reuse": (
        True,
        "leave it on: without it TensorRT-LLM never asks whether a prompt's blocks are here",
    ),
    "host_cache_size": (
        0,
        "set it to 0, and DYN_KVBM_CPU_CACHE_GB instead: to a host cache blocks move unseen",
    ),
}
"""The same, of `kv_cache_config`."""

NO_SCRATCH = (
    "set it to false: with it, blocks that a window will have passed share a page while a prompt "
    "is computed, and the connector is not told which"
)
NO_WINDOW = (
    "leave it out, or set use_kv_cache_manager_v2: the older manager does not say which blocks "
    "have left a window"
)


class Pool(NamedTuple):
    """The KV memory of one rank, by block."""

    regions: dict[str, torch.Tensor]
    """Each has one row of bytes for every block of its group."""
    groups: tuple[tuple[str, ...], ...]
    """The regions by the block table that numbers their blocks."""
    blocks: tuple[int, ...]
    """By group."""
    block_tokens: int
    shape: list[Any]
    """What of its form must be equal for bytes to be exchangeable."""
    windowed: bool = False
    """Whether blocks leave a request's table while it runs."""


class Identity(NamedTuple):
    """Who this engine is; the same on all of its ranks."""

    scope: Scope
    node: str
    instance: str


def check(args: Any) -> None:
    """Refuse arguments with which blocks could not be followed.

    Raises:
        SettingError: names the argument, its value, and what to do.
    """
    for owner, prefix, refused in (
        (args, "", REFUSED),
        (args.kv_cache_config, "kv_cache_config.", REFUSED_OF_CACHE),
    ):
        for name, (served, advice) in refused.items():
            value = getattr(owner, name, served)
            if value is not None and (value or None) != (served or None):
                raise SettingError(prefix + name, value, advice)


def pool_of_tensor(tensor: torch.Tensor, args: Any) -> Pool:
    """The one pool of releases up to 1.2: `[blocks, layers, keys and values, …]`.

    Raises:
        LayoutError: its blocks are not one run of bytes each.
        SettingError: blocks leave it, and this form of the interface does not say which.
    """
    if window := getattr(args.kv_cache_config, "max_attention_window", None):
        raise SettingError("kv_cache_config.max_attention_window", window, NO_WINDOW)
    if tensor.dim() < 2 or not tensor.is_contiguous():
        raise LayoutError(
            f"the KV pool has shape {tuple(tensor.shape)} and strides {tensor.stride()}, where "
            "one run of bytes for each block is needed"
        )
    tokens = getattr(args.kv_cache_config, "tokens_per_block", None) or DEFAULT_BLOCK_TOKENS
    shape = [str(tensor.dtype), list(tensor.shape[1:])]
    rows = tensor.reshape(tensor.shape[0], -1)
    return Pool({"pool": rows}, (("pool",),), (tensor.shape[0],), int(tokens), shape)


def pool_of_layout(layout: Any, args: Any) -> Pool:
    """The pools that newer releases describe: each group of layers numbers its own blocks.

    Raises:
        LayoutError: a group has no memory, or another number than its place says.
        SettingError: pages of a window are used twice, and it is not told which.
    """
    groups = layout.groups
    if [int(group.layer_group_id) for group in groups] != list(range(len(groups))) or not groups:
        raise LayoutError(
            f"the model's groups of layers are numbered "
            f"{[int(group.layer_group_id) for group in groups]}, where 0, 1, … is needed to tell "
            "whose blocks are whose: serve this model without the connector"
        )
    windowed = any(group.window_size is not None for group in groups)
    if windowed and getattr(args.kv_cache_config, "enable_swa_scratch_reuse", False):
        raise SettingError("kv_cache_config.enable_swa_scratch_reuse", True, NO_SCRATCH)
    regions = [(*group.regions, *getattr(group, "replicated_regions", ())) for group in groups]
    blocks = [{int(region.num_slots) for region in each} for each in regions]
    if any(len(counts) != 1 for counts in blocks):
        raise LayoutError("a group of layers has no memory, or not the same number of blocks in it")
    named = [
        {f"group {group} region {at}": region.as_tensor() for at, region in enumerate(each)}
        for group, each in enumerate(regions)
    ]
    return Pool(
        {name: tensor for each in named for name, tensor in each.items()},
        tuple(tuple(each) for each in named),
        tuple(count for counts in blocks for count in counts),
        int(layout.tokens_per_block),
        [[group.window_size, _form(each)] for group, each in zip(groups, regions, strict=True)],
        windowed,
    )


def _form(regions: Iterable[Any]) -> list[Any]:
    return [
        [region.size, [[ref.layer_id, ref.role, ref.expansion] for ref in region.buffers]]
        for region in regions
    ]


def identify(args: Any, pool: Pool, ranks: int, release: str, settings: Settings) -> Identity:
    """Who this engine is, in this life: made up once, by rank 0."""
    instance = uuid.uuid4().hex[:16]
    node = settings.node_name or identity.node_name(instance)
    return Identity(scope(args, pool, ranks, release, settings), node, instance)


def scope(args: Any, pool: Pool, ranks: int, release: str, settings: Settings) -> Scope:
    """Who can share blocks with this engine: a name, and a digest of all that shapes the bytes."""
    cache = args.kv_cache_config
    described: Mapping[str, Any] = {
        "engine": ["trtllm", release],
        "model": str(args.model),
        "revision": str(getattr(args, "revision", None)),
        "architecture": _architecture(args.model),
        "load_format": str(getattr(args, "load_format", None)),
        "quantization": str(getattr(args, "quant_config", None)),
        "dtype": str(getattr(args, "dtype", None)),
        "cache_dtype": str(getattr(cache, "dtype", None)),
        "attention": str(getattr(args, "attn_backend", None)),
        "block_tokens": pool.block_tokens,
        "pool": pool.shape,
        "ranks": ranks,
    }
    return identity.scope(settings.namespace, described)


def _architecture(model: object) -> str:
    """A digest of a local model's own configuration; empty for others' models."""
    config = Path(str(model)) / "config.json"
    return hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else ""
