"""The engine's KV tensors as regions of memory, whatever their shape."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from kvbm_service.adapters.mover import Region
from kvbm_service.errors import LayoutError


def regions(
    kv_caches: Mapping[str, torch.Tensor],
    num_blocks: int | Sequence[int],
    groups: Sequence[Collection[str]] = (),
) -> list[Region]:
    """The pieces that every block of this device pool has, in the order of the layers.

    `groups` are the names of the layers that share a block table, if there are several tables:
    then pieces come group by group. Layers of different groups may lie over the same memory, or
    have pools of their own: `num_blocks` is then by group.

    Raises:
        LayoutError: a layer belongs to no group, or see `_regions_of_group`.
    """
    counts = [num_blocks] * max(1, len(groups)) if isinstance(num_blocks, int) else num_blocks
    if len(groups) < 2:
        return _regions_of_group(kv_caches, counts[0])
    if stray := set(kv_caches).difference(*groups):
        raise LayoutError(f"layer {min(stray)} is in no KV cache group")
    return [
        region._replace(group=number)
        for number, (names, count) in enumerate(zip(groups, counts, strict=True))
        for region in _regions_of_group(
            {layer: tensor for layer, tensor in kv_caches.items() if layer in names}, count
        )
    ]


def _regions_of_group(kv_caches: Mapping[str, torch.Tensor], num_blocks: int) -> list[Region]:
    """The pieces of layers that share a block table.

    A tensor's block dimension is the leading one, or the second after a leading 2 (keys and
    values apart: two regions). Layers that share a tensor give one region; neighbours in
    memory, as when the engine keeps all layers of a block together, give one region too.

    Raises:
        LayoutError: a tensor has no such dimension, or a block in it is not one run of bytes.
    """
    found: dict[int, Region] = {}
    for layer, tensor in kv_caches.items():
        if not isinstance(tensor, torch.Tensor):
            raise LayoutError(f"the cache of layer {layer} is a {type(tensor).__name__}, no tensor")
        for half in _by_block(layer, tensor, num_blocks):
            region = _region(layer, half)
            if found.setdefault(region.address, region) != region:
                raise LayoutError(f"layer {layer} shares memory with another of different shape")
    if not found:
        raise LayoutError("the engine has no KV tensors")
    return _joined(list(found.values()))


def device(kv_caches: Mapping[str, torch.Tensor]) -> torch.device:
    """The one device that all KV tensors are on.

    Raises:
        LayoutError: there are several, or one that cannot be cached.
    """
    devices = {tensor.device for tensor in kv_caches.values()}
    if len(devices) != 1:
        raise LayoutError(f"the KV tensors are on {len(devices)} devices, not on one")
    (only,) = devices
    if only.type not in ("cpu", "cuda"):
        raise LayoutError(f"the KV tensors are on {only}: only cpu and cuda can be cached")
    return only


def _by_block(layer: str, tensor: torch.Tensor, num_blocks: int) -> list[torch.Tensor]:
    """The tensor as one or two whose leading dimension counts blocks."""
    shape = tuple(tensor.shape)
    leading = shape[:1] == (num_blocks,)
    halves = shape[:2] == (2, num_blocks)
    if leading and not halves:
        return [tensor]
    if halves and not leading:
        return [tensor[0], tensor[1]]
    raise LayoutError(
        f"layer {layer} has shape {shape}, where {num_blocks} blocks are not the first "
        "dimension, nor the second after a 2"
    )


def _region(layer: str, tensor: torch.Tensor) -> Region:
    """`tensor` by its leading dimension, if each entry is one run of bytes."""
    size = tensor.element_size()
    run = 1
    for stride, extent in sorted(zip(tensor.stride()[1:], tensor.shape[1:], strict=True)):
        if extent != 1 and stride != run:
            raise LayoutError(
                f"a block of layer {layer} is not one run of bytes: "
                f"shape {tuple(tensor.shape)}, strides {tensor.stride()}"
            )
        run *= extent
    count, stride = tensor.shape[0], tensor.stride(0)
    if run == 0 or (count > 1 and stride < run):
        raise LayoutError(f"blocks of layer {layer} overlap, or are empty")
    return Region(tensor.data_ptr(), stride * size, run * size, count)


def _joined(pieces: list[Region]) -> list[Region]:
    """Merge regions of which each block ends where the next one's begins."""
    joined = [pieces[0]]
    for piece in pieces[1:]:
        last = joined[-1]
        length = last.length + piece.length
        adjacent = piece.address == last.address + last.length
        if adjacent and piece.stride == last.stride >= length and piece.blocks == last.blocks:
            joined[-1] = last._replace(length=length)
        else:
            joined.append(piece)
    return joined
