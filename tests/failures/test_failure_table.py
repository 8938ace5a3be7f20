"""docs/failures.md names tests for every failure and every invariant; this sees that they exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "failures.md").read_text()
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")
ANY_TEST = re.compile(r"`(tests/[^`]*::[^`]*)`")
REMAINS = "What remains"
FIELDS = ("How long", "To be seen", "Tests")
FAILURES = 18
INVARIANTS = 5


def sections() -> dict[str, dict[str, str]]:
    """The text under each heading of the third level, by that of the second."""
    found: dict[str, dict[str, str]] = {}
    for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]:
        title, *rows = re.split(r"^### ", part, flags=re.MULTILINE)
        found[title.splitlines()[0]] = {row.splitlines()[0]: row for row in rows}
    return found


ALWAYS = "What always holds"
ROWS = {
    name: row for title, rows in sections().items() if title != ALWAYS for name, row in rows.items()
}


@cache
def defined_in(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


@pytest.mark.parametrize(("path", "name"), sorted(set(NAMED.findall(TEXT))))
def test_every_test_that_is_named_exists(path: str, name: str) -> None:
    assert name in defined_in(path)


def test_every_name_of_a_test_could_be_read() -> None:
    assert len(ANY_TEST.findall(TEXT)) == len(NAMED.findall(TEXT))


@pytest.mark.parametrize("failure", ROWS)
def test_a_failure_says_how_long_it_lasts_how_it_is_seen_and_what_proves_it(failure: str) -> None:
    assert all(f"**{field}:**" in ROWS[failure] for field in FIELDS)
    assert NAMED.search(ROWS[failure])


def test_none_is_missing() -> None:
    assert len(ROWS) == FAILURES
    assert len(sections()[ALWAYS]) == INVARIANTS
    assert all(NAMED.search(row) for row in sections()[ALWAYS].values())
    assert REMAINS in sections()
