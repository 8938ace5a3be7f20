"""One line of a benchmark's result."""

from __future__ import annotations

import msgspec


class Row(msgspec.Struct, frozen=True):
    """A figure, and what it is measured against. `ratio` is `value / yardstick_value`."""

    name: str
    value: float
    unit: str
    yardstick: str
    yardstick_value: float
    ratio: float
