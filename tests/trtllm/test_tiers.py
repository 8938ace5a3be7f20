"""The tiers below the host's memory, and later lives of the engine, work as for vLLM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trtllm.engine import Engine

PROMPT = [23 * i % 401 for i in range(50)]
FULL = 48


def on_disk(directory: Path) -> dict[str, str]:
    return {
        "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": "0",
        "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS": "64",
        "DYN_KVBM_DISK_CACHE_DIR": str(directory),
        "DYN_KVBM_DISK_DISABLE_O_DIRECT": "true",
    }


@pytest.mark.parametrize("ranks", [1, 2])
def test_blocks_come_back_from_a_disk_without_a_host_tier(
    make_engine: Callable[..., Engine], tmp_path: Path, ranks: int
) -> None:
    engine = make_engine(on_disk(tmp_path), ranks=ranks)
    engine.run(PROMPT)
    engine.forget_cached()
    assert engine.run(PROMPT).matched == FULL


def test_a_restarted_engine_finds_its_blocks_on_every_rank(
    make_engine: Callable[..., Engine], make_broken: Callable[..., Engine], tmp_path: Path
) -> None:
    first = make_broken(on_disk(tmp_path), ranks=2)
    first.run(PROMPT)
    first.kill()
    assert make_engine(on_disk(tmp_path), ranks=2).run(PROMPT).matched == FULL
