"""A bounded queue in which those who send much wait for themselves, and not before others."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Lines(Generic[T]):
    """One line per sender, served in turn. What one sender may have waiting is bounded."""

    def __init__(self, max_items: int, max_bytes: int, share: float) -> None:
        """`share` of both is the most that one sender gets."""
        self._max_items, self._max_bytes = max_items, max_bytes
        self._line_items, self._line_bytes = int(max_items * share), int(max_bytes * share)
        self._items = 0
        self._bytes = 0
        self._lines: OrderedDict[str, _Line[T]] = OrderedDict()

    def __len__(self) -> int:
        return self._items

    def put(self, sender: str, item: T, size: int) -> bool:
        """Queue an item of `size` bytes behind the sender's others; False if there is no room."""
        line = self._lines.get(sender)
        items, held = (len(line.items), line.bytes) if line is not None else (0, 0)
        if items >= self._line_items or held + size > self._line_bytes:
            return False
        if self._items >= self._max_items or self._bytes + size > self._max_bytes:
            return False
        if line is None:
            line = self._lines[sender] = _Line()
        line.items.append((item, size))
        line.bytes += size
        self._items += 1
        self._bytes += size
        return True

    def take(self) -> T:
        """The first item of the sender whose turn it is. There must be one."""
        sender, line = next(iter(self._lines.items()))
        item, size = line.items.popleft()
        line.bytes -= size
        self._items -= 1
        self._bytes -= size
        if line.items:
            self._lines.move_to_end(sender)
        else:
            del self._lines[sender]
        return item


class _Line(Generic[T]):
    def __init__(self) -> None:
        self.items: deque[tuple[T, int]] = deque()
        self.bytes = 0
