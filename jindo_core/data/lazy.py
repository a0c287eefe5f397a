"""Sequences whose items are made as they are asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar, overload

T = TypeVar("T", covariant=True)


class LazySequence(Sequence[T]):
    """A subclass has `__len__` and `_at`; a slice is a list, its items made at once."""

    @abstractmethod
    def _at(self, index: int) -> T:
        """The item at 0 <= index < len(self)."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        place = range(len(self))[index]  # an IndexError beyond the end
        return [self._at(i) for i in place] if isinstance(place, range) else self._at(place)
