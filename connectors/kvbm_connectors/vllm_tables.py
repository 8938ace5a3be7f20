"""vLLM's block tables, as rows (`rows.py`): all groups draw from one pool, and where one has let
go of its block, its table has vLLM's null block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvbm_connectors.rows import Row, Rows, whole
from kvbm_schemas.step import NO_BLOCK

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks


class Tables(Rows):
    """The rows of a vLLM engine, looked up in its own tables."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks_of: Callable[[str], KVCacheBlocks] | None = None
        """vLLM's tables as they are now: what left a window since is null there."""

    def rows(self, blocks: KVCacheBlocks, first: int, last: int) -> list[Row]:
        """Blocks `first` to `last` of a request; fewer if not all groups have got that far."""
        parts = [
            [NO_BLOCK if block.is_null else block.block_id for block in group[first:last]]
            for group in blocks.blocks
        ]
        return list(zip(*parts, strict=False))

    def whole(self, request: str, first: int, last: int) -> tuple[int, list[Row]]:
        """What can be saved of a request's blocks `first` to `last`, and which block that begins
        with: those behind the last one of which a part is gone.
        """
        assert self.blocks_of is not None
        return whole(self.rows(self.blocks_of(request), first, last), first)
