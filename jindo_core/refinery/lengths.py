"""Distributions of lengths in bounded memory: what they are told by, and how they are drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_EXACT = 1 << 14  # lengths below it are kept one by one
_PARTS = 1 << 11  # in each doubling above it: a length is kept to 1 in 2048
_BLOCKS = " ▏▎▍▌▋▊▉█"


class Lengths:
    """How often each length was seen: exact below 16,384, above it to 0.05%; half a megabyte, however many there are.

    Attributes:
        count, total, longest: of what was added; exact.
    """

    def __init__(self) -> None:
        self.count, self.total, self.longest = 0, 0, 0
        self._seen = np.zeros(_EXACT, dtype=np.int64)

    def add(self, length: int) -> None:
        place = _place(length)
        if place >= len(self._seen):
            self._seen = np.concatenate([self._seen, np.zeros(place + _PARTS - len(self._seen), dtype=np.int64)])
        self._seen[place] += 1
        self.count += 1
        self.total += length
        self.longest = max(self.longest, length)

    @property
    def mean(self) -> float:
        """0 where there are none."""
        return self.total / self.count if self.count else 0.0

    def percentile(self, percent: float) -> int:
        """The smallest length that so many percent do not exceed; 0 where there are none."""
        if not self.count:
            return 0
        wanted = max(math.ceil(self.count * percent / 100), 1)
        place = int(np.searchsorted(self._seen.cumsum(), wanted))
        return min(_lowest(place), self.longest)

    def above(self, limit: int) -> int:
        """How many exceed `limit`; exact for limits below 16,384."""
        return int(self._seen[_place(limit + 1) :].sum())

    def as_json(self) -> dict[str, float]:
        """Count, mean, longest and percentiles by name."""
        told = {f"p{percent}": self.percentile(percent) for percent in PERCENTILES}
        return {"count": self.count, "mean": round(self.mean, 2), **told, "max": self.longest}

    def bins(self, most: int = 16) -> list[tuple[int, int, int]]:
        """(from, below, how many) of at most so many bins, wider by a factor each, from the shortest to the longest."""
        if not self.count:
            return []
        shortest, high = self.percentile(0), self.longest + 1
        low = max(shortest, 1)
        edges = sorted({shortest, *(round(low * (high / low) ** (i / most)) for i in range(1, most)), high})
        sums = [*(self.count - self.above(edge - 1) for edge in edges[1:-1]), self.count]
        return [
            (start, end, upto - before)
            for start, end, upto, before in zip(edges, edges[1:], sums, [0, *sums], strict=False)
        ]


def _place(length: int) -> int:
    if length < _EXACT:
        return length
    doubling = length.bit_length() - _EXACT.bit_length()
    return _EXACT + doubling * _PARTS + (length >> (length.bit_length() - _PARTS.bit_length())) - _PARTS


def _lowest(place: int) -> int:
    """The smallest length of a place."""
    if place < _EXACT:
        return place
    doubling, part = divmod(place - _EXACT, _PARTS)
    return (_PARTS + part) << (doubling + _EXACT.bit_length() - _PARTS.bit_length())


def text_histogram(lengths: Lengths, width: int = 40) -> list[str]:
    """Lines such as `   64-127   1,234 ████▌`, a bin each."""
    bins = lengths.bins()
    most = max((count for *_, count in bins), default=1)
    lines = []
    for start, end, count in bins:
        eighths = round(count / most * width * 8)
        bar = "█" * (eighths // 8) + _BLOCKS[eighths % 8].strip()
        if count and not bar:
            bar = _BLOCKS[1]
        lines.append(f"{start:>8,}-{end - 1:<8,} {count:>10,} {bar}".rstrip())
    return lines


def draw_lengths(panels: Sequence[tuple[str, Mapping[str, Lengths]]], limits: Sequence[int], path: Path) -> None:
    """Draw distributions as PNG, one panel below another: (title of the axis, name -> lengths); the last has lines at
    `limits`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(panels), 1, figsize=(7, 3.2 * len(panels)), dpi=120, squeeze=False)
    for row, (axis, (title, named)) in enumerate(zip(axes[:, 0], panels, strict=True)):
        for name, lengths in named.items():
            bins = lengths.bins(40)
            edges = [max(start, 0.7) for start, *_ in bins] + [end for _, end, _ in bins[-1:]]
            if bins:
                axis.stairs([count for *_, count in bins], edges, label=f"{name} ({lengths.count:,})", linewidth=1.5)
        for limit in limits if row == len(panels) - 1 else ():
            axis.axvline(limit, color="#888888", linewidth=0.8, linestyle=":")
            axis.annotate(str(limit), (limit, 1), xycoords=("data", "axes fraction"), fontsize=7, ha="center")
        axis.set_xscale("log")
        axis.set_xlabel(title)
        axis.set_ylabel("texts")
        if named:
            axis.legend(frameon=False)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
