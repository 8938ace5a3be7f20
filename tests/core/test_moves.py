"""Moves that all ranks carry out."""

from __future__ import annotations

from kvbm_schemas.block import Tier
from kvbm_service.core.accounts import Path
from kvbm_service.core.moves import Move, Moves
from tests.core.builders import chain

SAVE = Move(Path.DEVICE_TO_HOST, Tier.HOST, chain("ab"), slots=[4, 5], device_blocks=[10, 11])


def open_moves(world_size: int) -> Moves:
    moves = Moves(world_size)
    moves.begin(1, SAVE)
    return moves


def test_a_move_is_settled_when_every_rank_has_reported() -> None:
    moves = open_moves(world_size=3)
    assert moves.report(1, rank=0, failed=[], seconds=0.1) is None
    assert moves.report(1, rank=2, failed=[], seconds=0.3) is None
    moves.check_integrity()
    assert moves.report(1, rank=1, failed=[], seconds=0.2) == (SAVE, set(), "", 0.3)
    assert len(moves) == 0
    moves.check_integrity()


def test_a_block_that_one_rank_has_not_got_has_failed_and_all_ranks_are_waited_for() -> None:
    moves = open_moves(world_size=2)
    assert moves.report(1, rank=1, failed=[1], reason="broken") is None
    assert moves.held_blocks == 2
    assert moves.report(1, rank=0, failed=[]) == (SAVE, {1}, "broken", 0.0)
    assert moves.held_blocks == 0
    moves.check_integrity()


def test_a_rank_counts_once() -> None:
    moves = open_moves(world_size=2)
    moves.report(1, rank=0, failed=[])
    assert moves.report(1, rank=0, failed=[]) is None
    assert moves.report(1, rank=0, failed=[0, 1]) is None
    assert moves.report(1, rank=1, failed=[]) == (SAVE, set(), "", 0.0)


def test_unknown_ops_ranks_and_positions_change_nothing() -> None:
    moves = open_moves(world_size=1)
    assert moves.report(2, rank=0, failed=[]) is None
    assert moves.report(1, rank=7, failed=[]) is None
    assert len(moves) == 1
    moves.check_integrity()
    assert moves.report(1, rank=0, failed=[2, 99]) == (SAVE, set(), "", 0.0)


def test_device_blocks_are_held_over_all_open_moves() -> None:
    moves = open_moves(world_size=1)
    moves.begin(2, SAVE._replace(blocks=chain("c"), slots=[6], device_blocks=[12]))
    assert moves.held_blocks == 3
    assert moves.under_way[Path.DEVICE_TO_HOST] == 2
    moves.report(1, rank=0, failed=[])
    assert moves.held_blocks == 1
    assert moves.under_way[Path.DEVICE_TO_HOST] == 1
    moves.check_integrity()
