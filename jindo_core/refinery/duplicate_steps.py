"""Steps that compare rows with each other: exact and near duplicates. `contamination.py` compares with other files."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from jindo_core.data.records import Record
from jindo_core.refinery.contamination import Contamination
from jindo_core.refinery.minhash import folded, near_duplicates, shingles, signature
from jindo_core.refinery.pipeline import Item, SetStep, Step, option, texts

Part = Literal["row", "question", "answer"]
_OF = "what is compared: the row, its questions or its answers"


def part_of(record: Record, part: Part) -> str:
    """The text of a record that is compared, its pieces apart by a line break."""
    if part == "row":
        return "\n".join(texts(record))
    if part == "answer":
        return "\n".join(each.output for each in record.rounds if each.output)
    return "\n".join(text for each in record.rounds for text in (each.instruction, each.input) if text)


def first_of_group(keys: np.ndarray) -> np.ndarray:
    """int64 [rows]: for each row the first one with the same key. keys: uint8 [rows, a multiple of 8]."""
    words = np.ascontiguousarray(keys).view(np.uint64)
    order = np.lexsort(words.T)  # stable: of equal keys the first row comes first
    words = words[order]
    begins = np.concatenate([[True], (words[1:] != words[:-1]).any(axis=1)])[: len(order)]
    leaders = np.empty(len(order), dtype=np.int64)
    leaders[order] = order[np.flatnonzero(begins)[np.cumsum(begins) - 1]]
    return leaders


@dataclass(frozen=True)
class ExactDuplicates(SetStep):
    """Rejects rows that say the same as an earlier one, but for case and blanks."""

    name: ClassVar[str] = "exact_duplicates"

    of: Literal["row", "question", "answer"] = option("row", _OF)
    letters_only: bool = option(False, "compare letters and digits only, without punctuation and blanks")

    def key(self, item: Item) -> bytes:
        text = part_of(item.record, self.of)
        if self.letters_only:
            content = folded(text).tobytes()
        else:
            content = " ".join(unicodedata.normalize("NFC", text).casefold().split()).encode("utf-8", "surrogatepass")
        return hashlib.blake2b(content, digest_size=16).digest() if content else b""

    def decide(self, keys: np.ndarray, numbers: np.ndarray) -> Iterator[tuple[int, str]]:
        leaders = first_of_group(keys)
        for row in np.flatnonzero(leaders != np.arange(len(leaders))).tolist():
            yield row, f"the same as row {numbers[leaders[row]]}"


@dataclass(frozen=True)
class NearDuplicates(SetStep):
    """Rejects rows that nearly repeat an earlier one (MinHash over runs of characters)."""

    name: ClassVar[str] = "near_duplicates"

    threshold: float = option(0.8, "Jaccard similarity from which on two rows are duplicates", at_least=0.3, at_most=1)
    of: Literal["row", "question", "answer"] = option("row", _OF)
    shingle: int = option(4, "characters in a run, letters and digits only", at_least=1, at_most=32)
    permutations: int = option(128, "places of a signature: more are more exact and slower", at_least=16, at_most=1024)
    min_chars: int = option(20, "rows with fewer letters and digits are not judged", at_least=1)

    def key(self, item: Item) -> bytes:
        codes = folded(part_of(item.record, self.of))
        if len(codes) < self.min_chars:
            return b""
        # The lower halves: two that differ agree by chance once in 65536 times, and the key file is half as large.
        return signature(shingles(codes, self.shingle), self.permutations).astype("<u2").tobytes()

    def decide(self, keys: np.ndarray, numbers: np.ndarray) -> Iterator[tuple[int, str]]:
        signatures = keys.view("<u2")
        for row, earlier in near_duplicates(signatures, self.threshold):
            share = (signatures[row] == signatures[earlier]).mean()
            yield row, f"nearly row {numbers[earlier]} (similarity {share:.2f})"


STEPS: tuple[type[Step], ...] = (ExactDuplicates, NearDuplicates, Contamination)
