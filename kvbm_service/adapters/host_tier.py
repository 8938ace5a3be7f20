"""One rank's device pool and slab, and the verified copies between them.

What every mover shares: a mover adds reading from other ranks.
"""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import xxhash

from kvbm_schemas.block import Tier
from kvbm_service.adapters.copies import Column, Copies, CpuCopies
from kvbm_service.adapters.lent_blocks import LentBlocks
from kvbm_service.adapters.mover import (
    NO_BLOCK,
    Blocks,
    DevicePool,
    Fence,
    Hop,
    Indices,
    Mask,
    Region,
    RemoteSlab,
    Stamps,
)
from kvbm_service.adapters.slab import Headers, Slab, names
from kvbm_service.errors import TransferError


class HostTier:
    """Saves device blocks into slots of `slab` and loads them back.

    With `verify`, a save also stamps a checksum of the device block, and whatever brings a
    block back compares the device's bytes with it: slow, for tests and hunting faults.

    Raises:
        TransferError: the slab's memory cannot be pinned.
    """

    def __init__(
        self, slab: Slab, regions: list[Region], copies: Copies, *, verify: bool = False
    ) -> None:
        assert slab.parts == parts(regions), "the slab is laid out for these regions"
        self.slab = slab
        self.regions = regions
        self._copies = copies
        self._copies_on_host = CpuCopies()
        self._verify = verify
        self._device_blocks = min(region.blocks for region in regions)
        self._addresses = np.array([region.address for region in regions], np.uint64)
        self._strides = np.array([region.stride for region in regions], np.uint64)
        self._group_of = np.array([region.group for region in regions])
        self._groups = 1 + int(self._group_of.max())
        self._blocks_of_group = [
            min((region.blocks for region in regions if region.group == group), default=0)
            for group in range(self._groups)
        ]
        self._lengths = np.array(slab.parts, np.uint64)
        self._offsets = np.array(slab.offsets, np.uint64)
        self.lent = LentBlocks(self._device_blocks)
        copies.pin(slab.start, slab.nbytes)

    def mark(self) -> Fence:
        return self._copies.mark()

    def save(self, blocks: Blocks) -> None:
        """See `Mover.save`."""
        self._check(blocks, self.slab.slots)
        self.check_whole(blocks.device)
        self.slab.clear(blocks.slots)
        to = self._in_slab(self.slab.base, blocks.slots)
        self._copy(to, self._in_pool(blocks.device), blocks.device)
        self.slab.stamp(blocks, self._checksums(blocks.device))

    def load(self, blocks: Blocks) -> Mask:
        """See `Mover.load`."""
        self._check(blocks, self.slab.slots)
        right = names(self.slab.read_headers(blocks.slots), blocks)
        chosen = blocks if right.all() else pick(blocks, right)
        if len(chosen.slots):
            self.fill_from(self.slab.base, chosen)
        headers = self.slab.read_headers(blocks.slots)
        images = self._rows(self.slab.base, blocks.slots)
        right &= self.arrived(headers, blocks, among=right, images=images)
        return right

    def lend(self, blocks: Blocks) -> None:
        """See `Mover.lend`."""
        self._check(blocks, self._device_blocks)
        assert self._groups == 1, "only blocks that all layers number alike can be lent"
        self.lent.lend(blocks, self._checksums(blocks.device))

    def unlend(self, device: Indices, op: int) -> None:
        """See `Mover.unlend`."""
        self.check_device(device)
        self.lent.take_back(device, op)

    def pool(self, device_id: int | None = None) -> DevicePool:
        """Where the device pool lies, for other nodes."""
        return DevicePool(
            headers=self.lent.start,
            blocks=self._device_blocks,
            device=device_id,
            regions=tuple((region.address, region.stride) for region in self.regions),
        )

    def fill_from_pool(self, owner: HostTier, blocks: Blocks) -> None:
        """Copy `blocks.slots` of another device pool, laid out like ours, into device blocks."""
        source = owner._in_pool(blocks.slots)
        self._copy(self._in_pool(blocks.device), source, blocks.device)

    def fill_from(self, base: int, blocks: Blocks) -> None:
        """Copy slots of a slab at `base`, laid out like ours, into device blocks."""
        source = self._in_slab(base, blocks.slots)
        self._copy(self._in_pool(blocks.device), source, blocks.device)

    def copy_out(self, device: Indices, to: Column) -> None:
        """Copy device blocks to memory: each, laid out like a slot, to an address of its own."""
        self._copy(self._pieces(to), self._in_pool(device), device)

    def copy_in(self, source: Column, device: Indices) -> Mask:
        """Copy blocks that lie at these addresses into device blocks.

        With `verify`, True where the device's bytes are then the same; without, everywhere.
        """
        self._copy(self._in_pool(device), self._pieces(source), device)
        found = self._checksums(device, source)
        return np.asarray(found == self._memory_checksums(source), np.bool_)

    def holds(self, slots: Indices, hashes: Column, fills: Stamps, copies: Column) -> Mask:
        """Which slots are named so; with `verify`, those of which `copies` are true as well."""
        headers = self.slab.read_headers(slots)
        right = names(headers, Blocks(hashes, fills, slots, slots))
        if self._verify:
            expected = headers["checksum"]
            right &= (expected == 0) | (expected == self._memory_checksums(copies))
        return right

    def stamp(self, slots: Indices, hashes: Column, fill: int) -> None:
        """Let slots that were filled from elsewhere be named so."""
        fills = np.full(len(slots), fill, np.uint64)
        sums = self._memory_checksums(self._rows(self.slab.base, slots))
        self.slab.stamp(Blocks(hashes, fills, slots, slots), sums)

    def adopt(self, rows: Column, headers: Headers, hop: Hop) -> Mask:
        """Copy blocks of another slab, which we have read to `rows`, into the target slots.

        Those, that is, which `headers`, read after their bytes, prove to be whole; True for
        these. The targets' headers are clear before.
        """
        right = names(headers, Blocks(hop.hashes, hop.fills, hop.source, hop.target))
        if self._verify:
            expected = headers["checksum"]
            right &= (expected == 0) | (expected == self._memory_checksums(rows))
        self.copy_rows(self._rows(self.slab.base, hop.target[right]), rows[right])
        proven, fills = hop.target[right], np.full(np.count_nonzero(right), hop.fill, np.uint64)
        arrived = Blocks(hop.hashes[right], fills, proven, proven)
        self.slab.stamp(arrived, headers["checksum"][right])
        return right

    def copy_rows(self, to: Column, source: Column) -> None:
        """Copy blocks within our own memory: each lies in one piece, like a slot."""
        lengths = np.full(len(to), self.slab.slot_bytes, np.uint64)
        self._copies_on_host.copy(to, source, lengths)

    def check_fetch(self, hop: Hop, peer: RemoteSlab) -> None:
        """Refuse slots that we or `peer` do not have.

        Raises:
            TransferError: a number is out of range.
        """
        if not len(hop.source) == len(hop.target) == len(hop.fills) == len(hop.hashes):
            raise TransferError("columns of a transfer differ in length")
        self.check_slots(hop.target)
        if len(hop.source) and int(hop.source.max()) >= peer.slots:
            raise TransferError(f"a slot of {peer.agent} is not below {peer.slots}")

    def check_slots(self, slots: Indices) -> None:
        """Refuse slots that the slab does not have.

        Raises:
            TransferError: a number is out of range.
        """
        if len(slots) and int(slots.max()) >= self.slab.slots:
            raise TransferError(f"a slot is not below {self.slab.slots}")

    def check_device(self, device: Indices) -> None:
        """Refuse device blocks that the pool does not have.

        Raises:
            TransferError: a number is out of range, or there is not one for each group.
        """
        if not len(device):
            return
        if device.size != len(device) * self._groups:
            raise TransferError(f"a device block has not {self._groups} numbers, one per group")
        rows = device.reshape(len(device), self._groups)
        if bool(((rows >= self._blocks_of_group) & (rows != NO_BLOCK)).any()):
            raise TransferError(f"a device block is not below {self._blocks_of_group}, by group")

    def check_whole(self, device: Indices) -> None:
        """Refuse device blocks that lack parts: what is saved is saved whole.

        Raises:
            TransferError: a group has no place for its part of some block.
        """
        if bool((device == NO_BLOCK).any()):
            raise TransferError("a block of which parts are gone cannot be saved")

    def pin(self, address: int, nbytes: int) -> None:
        """Make memory fit for copies to and from the device.

        Raises:
            TransferError: refused by the device's driver.
        """
        self._copies.pin(address, nbytes)

    def unpin(self, address: int) -> None:
        """Undo `pin`."""
        self._copies.unpin(address)

    def arrived(
        self,
        headers: Headers,
        blocks: Blocks,
        among: Mask | None = None,
        images: Column | None = None,
    ) -> Mask:
        """Which device blocks are proven whole, by the headers read after their bytes.

        Only those in `among` are looked at; the others are False. `images` is where whole blocks
        lie that parts which were not loaded are summed from; without, such blocks are not summed.
        """
        right = names(headers, blocks)
        if among is not None:
            right &= among
        if not self._verify:
            return right
        expected = headers["checksum"]
        summed = right & (expected != 0)
        if images is None:
            summed &= ~self._lacking(blocks.device)
        (looked_at,) = np.nonzero(summed)
        found = self._checksums(
            blocks.device[looked_at], None if images is None else images[looked_at]
        )
        right[looked_at] &= found == expected[looked_at]
        return right

    def check_pull(self, blocks: Blocks, peer: RemoteSlab, tier: Tier) -> None:
        """Refuse blocks that the pool or that tier of `peer` does not have.

        Raises:
            TransferError: a number is out of range, or the peer does not lend.
        """
        if tier is Tier.HOST:
            self._check(blocks, peer.slots)
            return
        if peer.pool is None or len(peer.pool.regions) != len(self.slab.parts):
            raise TransferError(f"{peer.agent} does not lend device blocks like ours")
        self._check(blocks, peer.pool.blocks)

    def check_layout(self, peer: RemoteSlab) -> None:
        """Refuse a peer whose blocks are not made like ours.

        Raises:
            TransferError: names what differs.
        """
        slab = self.slab
        if peer.parts != slab.parts or peer.slot_bytes != slab.slot_bytes:
            raise TransferError(
                f"{peer.agent} has blocks of {len(peer.parts)} parts and {peer.slot_bytes} bytes, "
                f"we have {len(slab.parts)} parts and {slab.slot_bytes} bytes: "
                "both must run the same model in the same arrangement"
            )

    def close(self) -> None:
        """Unpin the slab; its memory stays its owner's to free."""
        self.lent.close()
        self._copies.unpin(self.slab.start)

    def _check(self, blocks: Blocks, slots: int) -> None:
        if not len(blocks.slots) == len(blocks.device) == len(blocks.fills) == len(blocks.hashes):
            raise TransferError("columns of a transfer differ in length")
        self.check_device(blocks.device)
        if len(blocks.slots) and int(blocks.slots.max()) >= slots:
            raise TransferError(f"a slot is not below {slots}")

    def _in_slab(self, base: int, slots: Indices) -> Column:
        return self._pieces(self._rows(base, slots))

    def _rows(self, base: int, slots: Indices) -> Column:
        return slots.astype(np.uint64) * np.uint64(self.slab.slot_bytes) + np.uint64(base)

    def _pieces(self, starts: Column) -> Column:
        return (starts[:, None] + self._offsets).ravel()

    def _in_pool(self, device: Indices) -> Column:
        rows = self._by_region(device).astype(np.uint64)
        return (rows * self._strides + self._addresses).ravel()

    def _by_region(self, device: Indices) -> Indices:
        """The block's number in each region, as shape (n, regions)."""
        return device.reshape(len(device), self._groups)[:, self._group_of]

    def _lacking(self, device: Indices) -> Mask:
        """Which blocks lack a place for some part."""
        rows = device.reshape(len(device), self._groups)
        return np.asarray((rows == NO_BLOCK).any(axis=1), np.bool_)

    def _copy(self, to: Column, source: Column, device: Indices) -> None:
        """Copy the pieces of these blocks, but for those that have no place on the device."""
        lengths = np.tile(self._lengths, len(device))
        placed = (self._by_region(device) != NO_BLOCK).ravel()
        if not placed.all():
            to, source, lengths = to[placed], source[placed], lengths[placed]
        if len(to):
            self._copies.copy(to, source, lengths)

    def _checksums(self, device: Indices, images: Column | None = None) -> npt.NDArray[np.uint64]:
        """Of the device's bytes as they are now; 0 without `verify`.

        Parts that have no place on the device are taken from the blocks that lie at `images`.
        """
        sums = np.zeros(len(device), np.uint64)
        if self._verify and len(device):
            block = self._copies.host_buffer(self.slab.slot_bytes)
            to = self._offsets + np.uint64(block.ctypes.data)
            for i in range(len(device)):
                one = device[i : i + 1]
                if images is not None:
                    ctypes.memmove(block.ctypes.data, int(images[i]), len(block))
                self._copy(to, self._in_pool(one), one)
                sums[i] = xxhash.xxh3_64_intdigest(block.data) or 1  # 0 says "not taken"
        return sums

    def _memory_checksums(self, addresses: Column) -> npt.NDArray[np.uint64]:
        """Of blocks in our own memory; 0 without `verify`."""
        sums = np.zeros(len(addresses), np.uint64)
        if self._verify:
            for i, address in enumerate(addresses.tolist()):
                block = (ctypes.c_char * self.slab.slot_bytes).from_address(address)
                sums[i] = xxhash.xxh3_64_intdigest(block) or 1
        return sums


def parts(regions: list[Region]) -> tuple[int, ...]:
    """Lengths of the pieces of a block, in the order in which they fill a slot."""
    return tuple(region.length for region in regions)


def cut(hop: Hop, some: slice) -> Hop:
    """A part of a move."""
    return Hop(
        hashes=hop.hashes[some],
        fills=hop.fills[some],
        source=hop.source[some],
        target=hop.target[some],
        fill=hop.fill,
    )


def pick(blocks: Blocks, mask: Mask) -> Blocks:
    """The blocks for which `mask` is True."""
    return Blocks(
        hashes=blocks.hashes[mask],
        fills=blocks.fills[mask],
        slots=blocks.slots[mask],
        device=blocks.device[mask],
    )
