"""Which engines there are, and which of them a request may go to."""

from __future__ import annotations

import pytest

from kvbm_schemas.records import NodeRecord
from kvbm_schemas.subjects import Scope
from kvbm_service.route import fleet as module
from kvbm_service.route.fleet import ANSWERING, PREFILLING, Engine, Fleet, Role

SCOPE = Scope("default", "f00d")


def record(node: str, role: str = "both", instance: str = "1") -> NodeRecord:
    return NodeRecord(node=node, epoch=1, world_size=1, block_bytes=1, role=role, instance=instance)


def lists(fleet: Fleet, node: str, url: str, role: str = "both", instance: str = "1") -> None:
    fleet.listed(f"default.f00d.{node}", SCOPE, record(node, role, instance), url)


def urls(engines: list[Engine]) -> list[str]:
    return [engine.url for engine in engines]


def all_well(fleet: Fleet) -> None:
    for engine in fleet:
        engine.healthy = True


def test_an_engine_that_left_is_asked_only_when_nobody_else_is_there() -> None:
    fleet = Fleet()
    lists(fleet, "a", "http://a")
    lists(fleet, "b", "http://b")
    all_well(fleet)
    assert fleet.unlisted("default.f00d.a") is not None
    assert urls(fleet.usable(ANSWERING)) == ["http://b"]
    fleet.unlisted("default.f00d.b")
    assert urls(fleet.usable(ANSWERING)) == ["http://a", "http://b"]


def test_what_the_operator_names_stays_whatever_membership_says() -> None:
    fleet = Fleet()
    fleet.fix("http://a", Role.DECODE)
    lists(fleet, "a", "http://a", role="both")
    [engine] = fleet
    assert (engine.role, engine.name, engine.scope) == (Role.DECODE, "a", SCOPE)
    assert fleet.unlisted("default.f00d.a") is None
    assert engine.listed


def test_engines_are_told_apart_by_what_they_are_for() -> None:
    fleet = Fleet()
    for name, role in (("p", "prefill"), ("d", "decode"), ("b", "both")):
        lists(fleet, name, f"http://{name}", role)
    assert fleet.usable(ANSWERING) == [], "nobody has said that it is well"
    all_well(fleet)
    assert urls(fleet.usable(PREFILLING)) == ["http://p"]
    assert urls(fleet.usable(ANSWERING)) == ["http://d", "http://b"]


def test_ranks_with_one_url_are_one_engine() -> None:
    fleet = Fleet()
    lists(fleet, "n-dp0", "http://a")
    lists(fleet, "n-dp1", "http://a")
    [engine] = fleet
    assert engine.node_names == {"n-dp0", "n-dp1"}
    assert fleet.unlisted("default.f00d.n-dp0") is None
    assert fleet.unlisted("default.f00d.n-dp1") is engine


def test_a_node_that_moved_is_not_at_its_old_place_any_more() -> None:
    fleet = Fleet()
    lists(fleet, "a", "http://old")
    lists(fleet, "a", "http://new")
    all_well(fleet)
    assert urls(fleet.usable(ANSWERING)) == ["http://new"]


def test_a_new_life_of_an_engine_has_nothing_on_its_device() -> None:
    fleet = Fleet()
    lists(fleet, "a", "http://a")
    [engine] = fleet
    engine.recent.sent([b"x" * 16])  # type: ignore[list-item]
    lists(fleet, "a", "http://a")
    assert len(engine.recent) == 1
    lists(fleet, "a", "http://a", instance="2")
    assert len(engine.recent) == 0


def test_a_model_that_nobody_serves_is_for_any_engine_to_refuse() -> None:
    fleet = Fleet()
    lists(fleet, "a", "http://a")
    lists(fleet, "b", "http://b")
    all_well(fleet)
    a, b = fleet
    a.bases, b.bases = frozenset({"x"}), frozenset({"y"})
    assert fleet.usable(ANSWERING, "y") == [b]
    assert fleet.usable(ANSWERING, "z") == fleet.usable(ANSWERING, "") == [a, b]


def test_so_many_engines_are_known_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ENGINES", 2)
    fleet = Fleet()
    for name in "abc":
        lists(fleet, name, f"http://{name}")
    assert urls(list(fleet)) == ["http://a", "http://b"]
