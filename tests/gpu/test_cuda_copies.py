"""Copies between a real CUDA device and the slab."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from kvbm_service.adapters.device_pool import regions
from kvbm_service.adapters.host_tier import HostTier, parts
from kvbm_service.adapters.mover import NO_BLOCK, Blocks
from kvbm_service.adapters.slab import Slab

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

POOL, SLOTS = 64, 32


class Device:
    def __init__(self, *, one_by_one: bool) -> None:
        from kvbm_service.adapters.cuda_copies import CudaCopies

        self.caches = {
            f"layer{i}": torch.zeros(2, POOL, 16, 8, 128, dtype=torch.bfloat16, device="cuda")
            for i in range(4)
        }
        found = regions(self.caches, POOL)
        self.slab = Slab(SLOTS, parts(found))
        copies = CudaCopies(torch.device("cuda", torch.cuda.current_device()))
        if one_by_one:
            copies._many = None
        self.tier = HostTier(self.slab, found, copies, verify=True)

    def block(self, number: int) -> torch.Tensor:
        return torch.stack([cache[:, number] for cache in self.caches.values()]).cpu()

    def draw(self) -> None:
        for cache in self.caches.values():
            cache.normal_()


@pytest.fixture(params=[False, True], ids=["batched", "one_by_one"])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    device = Device(one_by_one=request.param)
    yield device
    device.tier.close()
    device.slab.close()


def _blocks(slots: list[int], device: list[int]) -> Blocks:
    return Blocks(
        hashes=np.array([(slot + 1, 7) for slot in slots], np.uint64),
        fills=np.ones(len(slots), np.uint64),
        slots=np.array(slots, np.uint32),
        device=np.array(device, np.uint32),
    )


def test_a_block_saved_from_the_device_loads_back_byte_for_byte(device: Device) -> None:
    device.draw()
    saved = [device.block(number) for number in (3, 0, 63)]
    device.tier.mark()()
    device.tier.save(_blocks([31, 2, 0], [3, 0, 63]))
    device.draw()
    untouched = device.block(4)
    assert device.tier.load(_blocks([31, 2, 0], [7, 8, 1])).tolist() == [True] * 3
    for number, expected in zip((7, 8, 1), saved, strict=True):
        assert torch.equal(device.block(number), expected)
    assert torch.equal(device.block(4), untouched)


def test_a_save_behind_a_fence_sees_what_the_engine_had_queued_before_it(device: Device) -> None:
    torch.cuda._sleep(200_000_000)  # about a tenth of a second of the device's time
    for cache in device.caches.values():
        cache.fill_(3)
    fence = device.tier.mark()
    fence()
    device.tier.save(_blocks([1], [1]))
    for cache in device.caches.values():
        cache.zero_()
    torch.cuda.synchronize()
    assert device.tier.load(_blocks([1], [1])).tolist() == [True]
    assert bool((device.block(1) == 3).all())


def test_a_bit_that_flipped_in_the_slab_is_seen_on_the_device(device: Device) -> None:
    device.draw()
    device.tier.mark()()
    device.tier.save(_blocks([1, 2], [1, 2]))
    at = device.slab.base - device.slab.start + device.slab.slot_bytes
    np.frombuffer(device.slab._memory, np.uint8)[at] ^= 1
    assert device.tier.load(_blocks([1, 2], [1, 2])).tolist() == [False, True]


def test_a_part_that_has_no_place_on_the_device_is_left_out() -> None:
    from kvbm_service.adapters.cuda_copies import CudaCopies

    memory = torch.zeros(POOL, 4096, dtype=torch.uint8, device="cuda")
    found = regions({"full": memory, "window": memory}, POOL, [{"full"}, {"window"}])
    slab = Slab(SLOTS, parts(found))
    copies = CudaCopies(torch.device("cuda", torch.cuda.current_device()))
    tier = HostTier(slab, found, copies, verify=True)
    memory.copy_(torch.arange(POOL, device="cuda", dtype=torch.uint8)[:, None])
    tier.mark()()
    saved = _blocks([1], [0])._replace(device=np.array([[3, 4]], np.uint32))
    tier.save(saved)
    memory.zero_()
    torch.cuda.synchronize()
    assert tier.load(saved._replace(device=np.array([[5, NO_BLOCK]], np.uint32))).all()
    held = memory[:, 0].tolist()
    assert [(at, value) for at, value in enumerate(held) if value] == [(5, 3)]
    tier.close()
    slab.close()
