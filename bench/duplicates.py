"""`python -m bench.duplicates --rows 1000000`: rows a second, memory and what is found of generated Korean rows.

A tenth of the rows are copies of an earlier one with a word replaced, a twentieth whole copies. Signatures lie in a
mapped file, as the refinery keeps them; one process makes them (the refinery takes one a core).
"""

from __future__ import annotations

import argparse
import random
import resource
import tempfile
import time
from collections.abc import Iterator

import numpy as np

from jindo_core.data.records import Record
from jindo_core.refinery.duplicate_steps import ExactDuplicates, NearDuplicates
from jindo_core.refinery.pipeline import Item

_STEMS = ("가을", "바다", "아침", "기차", "학교", "음악", "겨울", "시장", "골목", "하늘", "부엌", "마루", "창문")
_ENDS = ("에서", "으로", "까지", "부터", "처럼", "보다", "만큼", "이나", "에는", "하고", "라도", "마저", "조차")
_NAMES = [f"{stem}{place}{end}" for stem in _STEMS for place in "가나다라마바사아자차" for end in _ENDS]


def texts(count: int, seed: int) -> Iterator[tuple[str, bool]]:
    """Rows, and whether each was made from an earlier one; of those only the last 10,000 originals are remembered."""
    rng = random.Random(seed)
    recent: list[str] = []
    for _ in range(count):
        draw = rng.random()
        if recent and draw < 0.15:
            words = rng.choice(recent).split()
            if draw < 0.1:
                words[rng.randrange(len(words))] = rng.choice(_NAMES)
            yield " ".join(words), True
            continue
        text = " ".join(rng.choices(_NAMES, k=rng.randint(30, 60)))
        if len(recent) < 10_000:
            recent.append(text)
        else:
            recent[rng.randrange(10_000)] = text
        yield text, False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    for step in (ExactDuplicates(), NearDuplicates()):
        measure(step, options.rows, options.seed)


def measure(step: ExactDuplicates | NearDuplicates, rows: int, seed: int) -> None:
    width = len(step.key(Item(Record.single("", "", next(texts(1, seed))[0]), {}, 1)))
    with tempfile.TemporaryFile() as file:
        file.truncate(rows * width)
        keys = np.memmap(file, dtype=np.uint8, mode="r+", shape=(rows, width))
        made = np.zeros(rows, dtype=bool)
        keying, characters = 0.0, 0
        for row, (text, copied) in enumerate(texts(rows, seed)):
            item = Item(Record.single("", "", text), {}, row + 1)
            start = time.perf_counter()
            keys[row] = np.frombuffer(step.key(item), dtype=np.uint8)
            keying += time.perf_counter() - start
            made[row] = copied
            characters += len(text)
        before = _peak()
        start = time.perf_counter()
        found = np.zeros(rows, dtype=bool)
        for row, _ in step.decide(keys, np.arange(1, rows + 1)):
            found[row] = True
        deciding = time.perf_counter() - start
    print(
        f"{step.name}: {rows:,} rows of {characters / rows:.0f} characters; keys {rows / keying:,.0f} rows/s, deciding "
        f"{deciding:.1f} s ({rows / deciding:,.0f} rows/s); {found.sum():,} found of {made.sum():,} copies, "
        f"{(found & ~made).sum():,} others; peak {_peak():,.0f} MB ({_peak() - before:,.0f} above the keys' making), "
        f"key file {rows * width / 1e6:,.0f} MB"
    )


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    main()
