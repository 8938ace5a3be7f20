"""Blocks that are rows: parts of several block tables over the same device memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from kvbm_service.adapters.copies import CpuCopies
from kvbm_service.adapters.device_pool import regions
from kvbm_service.adapters.host_tier import HostTier, parts
from kvbm_service.adapters.mover import NO_BLOCK, Blocks
from kvbm_service.adapters.slab import Slab
from kvbm_service.errors import TransferError

POOL, SLOTS = 12, 4

WHOLE = [[1, 2], [3, 4]]


class Device:
    """Two layers over the same tensor, each with a block table of its own."""

    def __init__(self) -> None:
        self.memory = torch.zeros(POOL, 64, dtype=torch.uint8)
        tables = {"full": self.memory, "window": self.memory}
        found = regions(tables, POOL, [{"full"}, {"window"}])
        self.slab = Slab(SLOTS, parts(found))
        self.tier = HostTier(self.slab, found, CpuCopies(), verify=True)

    def fill(self) -> None:
        self.memory.copy_(torch.arange(POOL)[:, None] + 10)


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device()
    device.fill()
    yield device
    device.tier.close()
    device.slab.close()


def blocks(rows: list[list[int]]) -> Blocks:
    count = len(rows)
    return Blocks(
        hashes=np.array([(at + 1, 7) for at in range(count)], np.uint64),
        fills=np.ones(count, np.uint64),
        slots=np.arange(count, dtype=np.uint32),
        device=np.array(rows, np.uint32),
    )


def test_each_part_of_a_row_goes_where_its_table_says(device: Device) -> None:
    device.tier.save(blocks(WHOLE))
    device.memory.zero_()
    assert device.tier.load(blocks([[5, 6], [7, 8]])).all()
    assert device.memory[:, 0].tolist() == [0, 0, 0, 0, 0, 11, 12, 13, 14, 0, 0, 0]


def test_a_part_that_has_no_place_is_left_out_and_the_rest_is_proven(device: Device) -> None:
    device.tier.save(blocks(WHOLE))
    device.memory.zero_()
    assert device.tier.load(blocks([[5, NO_BLOCK], [7, 8]])).all()
    assert device.memory[:, 0].tolist() == [0, 0, 0, 0, 0, 11, 0, 13, 14, 0, 0, 0]


def test_a_row_without_any_place_copies_nothing(device: Device) -> None:
    device.tier.save(blocks(WHOLE))
    device.memory.zero_()
    assert device.tier.load(blocks([[NO_BLOCK, NO_BLOCK]])).all()
    assert not device.memory.any()


def test_a_row_that_lacks_a_part_is_not_saved(device: Device) -> None:
    with pytest.raises(TransferError, match="parts are gone"):
        device.tier.save(blocks([[1, 2], [3, NO_BLOCK]]))
    assert not device.tier.load(blocks(WHOLE)).any()


@pytest.mark.parametrize("rows", [[[1, POOL]], [[POOL, 1]], [[1]], [[1, 2, 3]]])
def test_a_row_that_is_not_one_of_this_pool_is_refused(
    device: Device, rows: list[list[int]]
) -> None:
    with pytest.raises(TransferError, match="device block"):
        device.tier.save(blocks(rows))
