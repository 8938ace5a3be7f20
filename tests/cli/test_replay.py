"""`kvbm replay` in a real process, on a trace of a few lines."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Conversations of three turns, one after the other and some in between."""
    rng = random.Random(5)
    lines = []
    for number in range(120):
        person, turn = rng.randrange(30), rng.randrange(1, 4)
        blocks = [0, *(100 * (person + 1) + i for i in range(3 * turn)), 10_000 + number]
        lines.append(
            {
                "timestamp": 500 * number,
                "input_length": 512 * len(blocks),
                "output_length": 100,
                "hash_ids": blocks,
            }
        )
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_json_has_a_row_for_each_policy_and_capacity(kvbm, trace: Path) -> None:
    done = kvbm(
        "replay", "--trace", trace, "--policy", "default,clairvoyant", "--capacity", "5%,20%",
        "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["policy"], row["capacity"]) for row in rows] == [
        ("default", 0.05),
        ("clairvoyant", 0.05),
        ("default", 0.2),
        ("clairvoyant", 0.2),
    ]
    for row in rows:
        assert set(row) == {"trace", "policy", "capacity", "prefix_hit_ratio"}
        assert row["trace"] == "chat"
        assert 0 < row["prefix_hit_ratio"] < 1


def test_the_table_names_every_policy_and_what_the_default_costs(kvbm, trace: Path) -> None:
    pytest.importorskip("libcachesim")
    done = kvbm("replay", "--trace", trace, "--capacity", "10%", "--disk", "4")
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode()
    for policy in ("default", "lru", "arc", "s3fifo", "clairvoyant"):
        assert policy in text
    assert "bytes per slot" in text
    assert "with a disk tier" in text


def test_a_plot_is_drawn(kvbm, trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plot.png"
    done = kvbm("replay", "--trace", trace, "--policy", "default", "--plot", picture)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        (["--trace", "/nowhere.jsonl"], "Mooncake's jsonl format"),
        (["--capacity", "5%,x"], "percentages above 0"),
        (["--capacity", "0"], "percentages above 0"),
        (["--policy", "mru"], "default, lru, arc, s3fifo, clairvoyant"),
        (["--disk", "-1"], "how many times the host tier"),
    ],
)
def test_a_wrong_option_is_one_line_that_says_what_is_allowed(
    kvbm, trace: Path, arguments: list[str], cure: str
) -> None:
    given = arguments if "--trace" in arguments else ["--trace", trace, *arguments]
    done = kvbm("replay", *given)
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    assert cure in line


def test_a_malformed_line_is_named(kvbm, trace: Path) -> None:
    trace.write_text(trace.read_text() + "\n{oops\n")
    done = kvbm("replay", "--trace", trace)
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    assert "chat.jsonl:121" in line
