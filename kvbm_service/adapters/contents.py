"""What a table of stamped slots says that it holds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvbm_service.adapters.disk import Contents
from kvbm_service.adapters.mover import Mask, Stamps

Column = npt.NDArray[np.uint64]


def contents(hashes: npt.NDArray[np.uint64], fills: Stamps) -> Contents:
    """The blocks named by slots with a stamp, oldest first; of those named twice, the newest.

    One row per slot: `hashes` of shape (slots, 2), `fills` 0 where a slot is empty.
    """
    slots = np.flatnonzero(fills)
    slots = slots[np.argsort(fills[slots], kind="stable")]
    words = hashes[:, 0][slots], hashes[:, 1][slots]  # several times faster than rows
    newest = _last_of_each(*words)
    slots = slots[newest]
    return Contents(
        hashes=np.stack([word[newest] for word in words], axis=1),
        fills=fills[slots],
        slots=slots.astype(np.uint32),
    )


def _last_of_each(first: Column, second: Column) -> Mask:
    """Which names, of two words each, are not repeated by a later one."""
    last = np.ones(len(first), np.bool_)
    in_order = np.sort(first)
    if (in_order[1:] == in_order[:-1]).any():  # rare, and sorting by both words is slow
        order = np.lexsort((second, first))  # equal ones stay in their order
        same = (first[order][1:] == first[order][:-1]) & (second[order][1:] == second[order][:-1])
        last[order[:-1][same]] = False
    return last
