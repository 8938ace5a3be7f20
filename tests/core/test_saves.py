"""Saves that all ranks carry out."""

from __future__ import annotations

from kvbm_service.core.saves import Save, Saves

SAVE = Save(slots=[4, 5], device_blocks=[10, 11])


def open_saves(world_size: int) -> Saves:
    saves = Saves(world_size)
    saves.begin(1, SAVE)
    return saves


def test_a_save_is_good_when_every_rank_has_said_so() -> None:
    saves = open_saves(world_size=3)
    assert saves.report(1, rank=0, good=True) is None
    assert saves.report(1, rank=2, good=True) is None
    saves.check_integrity()
    settled = saves.report(1, rank=1, good=True)
    assert settled == (SAVE, True)
    assert len(saves) == 0
    saves.check_integrity()


def test_one_failed_rank_spoils_the_save_but_all_are_waited_for() -> None:
    saves = open_saves(world_size=2)
    assert saves.report(1, rank=1, good=False) is None
    assert saves.held_blocks == 2
    assert saves.report(1, rank=0, good=True) == (SAVE, False)
    assert saves.held_blocks == 0
    saves.check_integrity()


def test_a_rank_counts_once() -> None:
    saves = open_saves(world_size=2)
    saves.report(1, rank=0, good=True)
    assert saves.report(1, rank=0, good=True) is None
    assert saves.report(1, rank=0, good=False) is None
    assert saves.report(1, rank=1, good=True) == (SAVE, True)


def test_unknown_ops_and_ranks_change_nothing() -> None:
    saves = open_saves(world_size=1)
    assert saves.report(2, rank=0, good=True) is None
    assert saves.report(1, rank=7, good=True) is None
    assert len(saves) == 1
    saves.check_integrity()


def test_device_blocks_are_held_over_all_open_saves() -> None:
    saves = open_saves(world_size=1)
    saves.begin(2, Save(slots=[6], device_blocks=[12]))
    assert saves.held_blocks == 3
    saves.report(1, rank=0, good=True)
    assert saves.held_blocks == 1
    saves.check_integrity()
