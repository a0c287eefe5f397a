"""Steps of every kind for the refinery's tests, in a module that worker processes can import."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jindo_core.data.records import Round
from jindo_core.refinery.pipeline import (
    Flagged,
    JoinStep,
    RawStep,
    Rejected,
    RowStep,
    SetStep,
    map_outputs,
    option,
    texts,
)


def last_digit(item):
    return int(item.record.output[-1])


@dataclass(frozen=True)
class RawDouble(RawStep):
    """Makes two rows of one whose answer ends in 9, and rejects 8."""

    name = "raw_double"

    def __call__(self, values):
        output = values.get("output")
        if not isinstance(output, str):
            return values
        if output.endswith("9"):
            return [{**values, "output": output + "1"}, {**values, "output": output + "2"}]
        return Rejected("an eight") if output.endswith("8") else values


@dataclass(frozen=True)
class Drop(RowStep):
    """Rejects answers that end in a digit."""

    name = "drop"
    digit: int = option(1, "the digit", at_least=0, at_most=9)

    def __call__(self, item):
        return Rejected(f"ends in {self.digit}") if last_digit(item) == self.digit else item


@dataclass(frozen=True)
class Triple(RowStep):
    """Makes three rows of one whose answer ends in a digit."""

    name = "triple"
    digit: int = option(2, "the digit", at_least=0, at_most=9)

    def __call__(self, item):
        if last_digit(item) != self.digit:
            return item
        return [replace(item, record=map_outputs(item.record, lambda t, n=n: f"{t}{n}")) for n in range(3)]


@dataclass(frozen=True)
class Flag(RowStep):
    """Flags answers that end in 3, and changes them."""

    name = "flag"

    def __call__(self, item):
        if last_digit(item) != 3:
            return item
        return Flagged(replace(item, record=map_outputs(item.record, lambda t: "!" + t)), "a three", {"threes": 1})


@dataclass(frozen=True)
class Unlike(SetStep):
    """Rejects rows whose answer stood before; answers that end in 0 don't concern it."""

    name = "unlike"

    def key(self, item):
        return b"" if last_digit(item) == 0 else item.record.output.encode().rjust(32)[-32:]

    def decide(self, keys, numbers):
        seen = {}
        for index, key in enumerate(map(bytes, keys)):
            if key in seen:
                yield index, f"as row {seen[key]}"
            seen.setdefault(key, int(numbers[index]))


@dataclass(frozen=True)
class Pair(JoinStep):
    """Joins rows with the same last digit, three of them at most refused; answers that end in 5 don't concern it."""

    name = "pair"

    def key(self, item):
        return b"" if last_digit(item) == 5 else bytes([last_digit(item)])

    def leaders(self, keys):
        first = {}
        return np.array([first.setdefault(bytes(key), index) for index, key in enumerate(keys)], np.int64)

    def join(self, items):
        if len(items) == 3:
            return Rejected("three of a kind")
        if len(items) == 1:
            return items[0]
        rounds = (Round("joined", "", "+".join(text for item in items for text in texts(item.record))),)
        return replace(items[0], record=replace(items[0].record, rounds=rounds))


@dataclass(frozen=True)
class Die(RowStep):
    """Ends the worker process as the system would that has no memory left."""

    name = "die"

    def __call__(self, item):
        if item.number == 1500:
            os._exit(9)
        return item


@dataclass(frozen=True)
class Hang(RowStep):
    """Says who it is in a file, and waits."""

    name = "hang"
    file: str = option("", "where it says so", path=True)

    def __call__(self, item):
        if item.number == 1:
            Path(self.file).with_suffix(".part").write_text(str(os.getpid()))
            Path(self.file).with_suffix(".part").rename(self.file)
            time.sleep(60)
        return item


TOYS = {step.name: step for step in (RawDouble, Drop, Triple, Flag, Unlike, Pair, Die, Hang)}
