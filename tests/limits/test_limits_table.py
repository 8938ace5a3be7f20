"""docs/limits.md says what the code does: each limit, its value, and the test at its bound."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "limits.md"
SOURCES = {"kvbm_service": ".", "kvbm_schemas": "schemas", "kvbm_connectors": "connectors"}
NOT_SERVING = ("kvbm_service/bench", "kvbm_service/demo", "kvbm_service/replay")
LIMIT = re.compile(r"_?MAX_[A-Z0-9_]+|[A-Z0-9_]+_LIMIT")


class Row(NamedTuple):
    """A limit, as the page has it."""

    name: str
    module: str
    value: object
    test: str


def _rows() -> list[Row]:
    rows = []
    for line in TABLE.read_text().splitlines():
        cells = [cell.strip().strip("`") for cell in line.split("|")[1:-1]]
        if len(cells) >= 4 and cells[1].startswith("kvbm_"):
            test = cells[5] if len(cells) == 6 else "—"
            rows.append(Row(cells[0], cells[1], ast.literal_eval(cells[2].replace(",", "")), test))
    return rows


def _constants() -> set[tuple[str, str]]:
    """All limits that the packages define, with their module."""
    found = set()
    for package, folder in SOURCES.items():
        for path in (ROOT / folder / package).rglob("*.py"):
            inside = path.relative_to(ROOT / folder)
            if str(inside).startswith(NOT_SERVING):
                continue
            module = ".".join(inside.with_suffix("").parts)
            found |= {(name, module) for name in _assigned(path) if LIMIT.fullmatch(name)}
    return found


def _assigned(path: Path) -> set[str]:
    """Names that a module assigns at its top level."""
    names = set()
    for statement in ast.parse(path.read_text()).body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_every_limit_of_the_code_is_in_the_table() -> None:
    assert _constants() - {(row.name, row.module) for row in _rows()} == set()


@pytest.mark.filterwarnings("ignore")  # what an engine warns of when it is imported
@pytest.mark.parametrize("row", _rows(), ids=lambda row: f"{row.module}.{row.name}")
def test_a_limit_has_the_value_that_the_table_says(row: Row) -> None:
    try:
        module = importlib.import_module(row.module)
    except ImportError as missing:
        pytest.skip(str(missing))
    assert getattr(module, row.name) == row.value


@pytest.mark.parametrize(
    "test", sorted({row.test for row in _rows()} - {"—"}), ids=lambda test: test
)
def test_the_test_at_a_limits_bound_exists(test: str) -> None:
    file, _, name = test.partition("::")
    assert re.search(rf"def {name}\(", (ROOT / "tests" / file).read_text())
