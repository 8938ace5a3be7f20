"""Engines' KV tensors as regions, and the memory of the host slab."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from kvbm_service.adapters.affinity import every_cpu, use_every_cpu
from kvbm_service.adapters.device_pool import device, regions
from kvbm_service.adapters.mover import HEADER_PAGE, Region
from kvbm_service.adapters.slab import Slab
from kvbm_service.errors import LayoutError

BLOCKS = 10


def test_a_tensor_with_blocks_first_is_one_region() -> None:
    tensor = torch.zeros(BLOCKS, 4, 8, dtype=torch.float32)
    assert regions({"a": tensor}, BLOCKS) == [Region(tensor.data_ptr(), 128, 128, BLOCKS)]


def test_keys_and_values_apart_are_two_regions() -> None:
    tensor = torch.zeros(2, BLOCKS, 16, dtype=torch.uint8)
    assert regions({"a": tensor}, BLOCKS) == [
        Region(tensor.data_ptr(), 16, 16, BLOCKS),
        Region(tensor.data_ptr() + 16 * BLOCKS, 16, 16, BLOCKS),
    ]


def test_layers_that_share_a_tensor_are_one_region_and_neighbours_are_joined() -> None:
    whole = torch.zeros(BLOCKS, 3, 16, dtype=torch.uint8)
    layers = {"a": whole[:, 0], "again": whole[:, 0], "b": whole[:, 1]}
    assert regions(layers, BLOCKS) == [Region(whole.data_ptr(), 48, 32, BLOCKS)]


def test_layers_of_two_block_tables_may_lie_over_the_same_memory() -> None:
    shared = torch.zeros(BLOCKS, 16, dtype=torch.uint8)
    layers = {"full": shared, "window": shared}
    address = shared.data_ptr()
    assert regions(layers, BLOCKS, [{"full"}, {"window"}]) == [
        Region(address, 16, 16, BLOCKS, group=0),
        Region(address, 16, 16, BLOCKS, group=1),
    ]
    with pytest.raises(LayoutError, match="layer window is in no KV cache group"):
        regions(layers, BLOCKS, [{"full"}, {"other"}])


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.zeros(3, BLOCKS, 4), "not the first dimension"),
        (torch.zeros(BLOCKS + 1, 4), "not the first dimension"),
        (torch.zeros(4, BLOCKS).t(), "not one run of bytes"),
        (torch.zeros(BLOCKS, 4, 8)[:, :, :3], "not one run of bytes"),
        (torch.zeros(1, 4).expand(BLOCKS, 4), "overlap"),
        (torch.zeros(BLOCKS, 0), "empty"),
    ],
)
def test_a_tensor_whose_blocks_are_not_runs_of_bytes_is_refused_in_words(
    tensor: torch.Tensor, words: str
) -> None:
    with pytest.raises(LayoutError, match=words):
        regions({"layer.7": tensor}, BLOCKS)


def test_two_blocks_after_a_two_could_mean_either_and_are_refused() -> None:
    with pytest.raises(LayoutError):
        regions({"a": torch.zeros(2, 2, 8)}, 2)


def test_a_layer_with_several_tensors_of_state_is_refused_by_name() -> None:
    with pytest.raises(LayoutError, match=r"mamba\.0 is a list"):
        regions({"mamba.0": [torch.zeros(BLOCKS, 4)]}, BLOCKS)  # type: ignore[dict-item]


def test_an_engine_without_tensors_or_with_several_devices_is_refused() -> None:
    with pytest.raises(LayoutError):
        regions({}, BLOCKS)
    with pytest.raises(LayoutError):
        device({"a": torch.zeros(1), "b": torch.zeros(1, device="meta")})


def test_a_slab_larger_than_the_machine_is_refused_with_the_setting_to_change() -> None:
    with pytest.raises(LayoutError, match="DYN_KVBM_CPU_CACHE_GB"):
        Slab(1 << 30, (1 << 20,))


def test_a_slab_is_page_aligned_and_its_headers_can_be_read_by_the_page() -> None:
    slab = Slab(3, (100, 28))
    record = slab.record()
    assert record.base % 4096 == record.headers % 4096 == 0
    assert record.base - record.headers >= HEADER_PAGE * record.header_bytes
    assert (record.slot_bytes, record.parts) == (128, (100, 28))
    slab.close()


def test_a_thread_of_ours_escapes_the_cpus_that_it_inherited() -> None:
    allowed: list[set[int]] = []

    def pinned_then_freed() -> None:
        use_every_cpu()
        everything = os.sched_getaffinity(0)
        one = {min(everything)}
        os.sched_setaffinity(0, one)
        with every_cpu():
            allowed.append(os.sched_getaffinity(0))
        allowed.extend((everything, os.sched_getaffinity(0), one))

    thread = threading.Thread(target=pinned_then_freed)
    thread.start()
    thread.join()
    inside, everything, after, one = allowed
    assert inside == everything
    assert after == one
