"""The step that keeps rows of evaluation sets out of the training data."""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jindo_core.data.readers import open_rows
from jindo_core.errors import InputError
from jindo_core.refinery.minhash import band_hashes, bands, folded, shingles, signature
from jindo_core.refinery.pipeline import Item, Rejected, RowStep, option, texts

_WORD = re.compile(r"[^\W_]+")
_MULTIPLIER = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_PLACES = 128  # of a signature
_SHINGLE = 4
_LEAST_GRAMS = 3  # shared runs of words from which on a part of an evaluation text counts


def _grams(text: str, size: int) -> np.ndarray:
    """uint64: hashes of the runs of `size` words of a text, each once; empty where it has fewer words."""
    words = _WORD.findall(text.lower())
    count = len(words) - size + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    hashes = np.fromiter((zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words), np.uint64, len(words))
    value = np.zeros(count, dtype=np.uint64)
    for place in range(size):
        value = (value ^ hashes[place : place + count]) * np.uint64(_MULTIPLIER)
        value ^= value >> np.uint64(31)
    return np.unique(value)


def _strings(value: Any) -> Iterator[str]:
    """Every text within a row's value, however deep (turns, lists of choices)."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


class EvaluationIndex:
    """The texts of evaluation files, found by equality, by runs of words, and by likeness.

    Attributes:
        places: where each text comes from ("dev.tsv, row 3").
    """

    def __init__(self, paths: tuple[str, ...], columns: tuple[str, ...], ngram: int, threshold: float, min_chars: int):
        self.places: list[str] = []
        self._exact: dict[bytes, int] = {}
        self._ngram = ngram
        self._threshold = threshold
        self._shingles: list[np.ndarray] = []
        grams: list[np.ndarray] = []
        signatures: list[np.ndarray] = []
        for place, text in _texts_of(paths, columns):
            codes = folded(text)
            content = codes.tobytes()
            if len(codes) < min_chars or content in self._exact:
                continue
            self._exact[content] = len(self.places)
            self.places.append(place)
            grams.append(_grams(text, ngram))
            hashes = shingles(codes, _SHINGLE)
            self._shingles.append(np.unique(hashes))
            signatures.append(signature(hashes, _PLACES))
        if not self.places:
            raise InputError(
                f"{', '.join(paths)}: no text of at least {min_chars} letters to compare with; give another file, "
                "other columns or a smaller min_chars"
            )
        self._gram_counts = np.array([len(each) for each in grams])
        self._grams = np.concatenate(grams)
        order = np.argsort(self._grams, kind="stable")
        self._owners = np.repeat(np.arange(len(grams)), self._gram_counts)[order]
        self._grams = self._grams[order]
        self._bands = bands(threshold, _PLACES)
        hashes = band_hashes(np.stack(signatures), 0, self._bands[1], self._bands[0])
        order = np.argsort(hashes, axis=None, kind="stable")
        self._band_hashes, self._band_owners = hashes.ravel()[order], order // self._bands[0]

    def equal(self, codes: np.ndarray) -> int | None:
        """The evaluation text that is the same but for case, blanks and punctuation."""
        return self._exact.get(codes.tobytes())

    def overlap(self, text: str, share: float) -> tuple[int, float] | None:
        """The evaluation text that shares most runs of words, from `share` of the shorter one's on, and that share.

        Three shared runs are needed, or all of an evaluation text that has fewer.
        """
        grams = _grams(text, self._ngram)
        spots = _spots(self._grams, grams)
        if not len(spots):
            return None
        owners, shared = np.unique(self._owners[spots], return_counts=True)
        whole = self._gram_counts[owners]
        shares = shared / np.minimum(whole, len(grams))
        shares[(shared < _LEAST_GRAMS) & (shared < whole)] = 0
        best = int(np.argmax(shares))
        return (int(owners[best]), float(shares[best])) if shares[best] >= share else None

    def near(self, codes: np.ndarray) -> tuple[int, float] | None:
        """The evaluation text with the highest Jaccard similarity of character runs, from the threshold on."""
        hashes = shingles(codes, _SHINGLE)
        ours = signature(hashes, _PLACES)[None]
        keys = band_hashes(ours, 0, self._bands[1], self._bands[0])[0]
        candidates = self._band_owners[_spots(self._band_hashes, keys)]
        if not len(candidates):
            return None
        own = np.unique(hashes)
        best: tuple[int, float] | None = None
        for candidate in np.unique(candidates).tolist():
            theirs = self._shingles[candidate]
            both = len(np.intersect1d(own, theirs, assume_unique=True))
            similarity = both / (len(own) + len(theirs) - both)
            if similarity >= self._threshold and (best is None or similarity > best[1]):
                best = candidate, similarity
        return best


def _spots(table: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The places in a sorted table that hold one of `keys`."""
    first = np.searchsorted(table, keys, "left")
    found = np.flatnonzero(table[np.minimum(first, len(table) - 1)] == keys) if len(table) else first[:0]
    if not len(found):
        return found
    first = first[found]
    counts = np.searchsorted(table, keys[found], "right") - first
    ends = np.cumsum(counts)
    return np.repeat(first - (ends - counts), counts) + np.arange(ends[-1])


def _texts_of(paths: tuple[str, ...], columns: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for path in paths:
        source = open_rows(path)
        for row in source:
            absent = [name for name in columns if name not in row.values]
            if absent:
                raise InputError(
                    f"{row.place} lacks the column {absent[0]!r}: its columns are {', '.join(map(repr, row.values))}"
                )
            place = f"{row.path.name}, row {row.number}"
            for name in columns or tuple(row.values):
                for text in _strings(row.values[name]):
                    # An address is no text, and a dictionary's is in many rows.
                    if not text.startswith(("http://", "https://")) or " " in text:
                        yield place, text


@functools.lru_cache(maxsize=8)
def _index(
    paths: tuple[str, ...], columns: tuple[str, ...], ngram: int, threshold: float, min_chars: int
) -> EvaluationIndex:
    return EvaluationIndex(paths, columns, ngram, threshold, min_chars)


@dataclass(frozen=True)
class Contamination(RowStep):
    """Rejects rows that hold a text of an evaluation set: the same, a great part of it, or nearly it.

    Each worker reads the evaluation files once and holds their index: some 20 bytes a character of theirs.
    """

    name: ClassVar[str] = "contamination"

    against: tuple[str, ...] = option(None, "evaluation files or folders, of any format that is read", path=True)
    columns: tuple[str, ...] = option((), "columns of theirs to compare with (all that hold text where left out)")
    ngram: int = option(8, "words in a run", at_least=2, at_most=64)
    overlap: float = option(0.5, "share of the shorter text's runs of words that makes an overlap", above=0, at_most=1)
    threshold: float = option(
        0.8, "Jaccard similarity of character runs that makes two texts the same", at_least=0.3, at_most=1
    )
    min_chars: int = option(20, "letters and digits of an evaluation text that is worth looking for", at_least=4)

    def __post_init__(self) -> None:
        if not self.against:
            raise InputError("contamination: got no evaluation file, expected against: [path, …]")
        for path in self.against:
            if not Path(path).exists():
                raise InputError(
                    f"contamination: {path} does not exist: expected an evaluation file or a folder of them"
                )

    def __call__(self, item: Item) -> Item | Rejected:
        index = _index(self.against, self.columns, self.ngram, self.threshold, self.min_chars)
        for text in texts(item.record):
            codes = folded(text)
            if len(codes) < self.min_chars:
                continue
            same = index.equal(codes)
            if same is not None:
                return Rejected(f"the same as {index.places[same]}")
            found = index.overlap(text, self.overlap)
            if found is not None:
                return Rejected(f"shares {100 * found[1]:.0f}% of its runs of words with {index.places[found[0]]}")
            found = index.near(codes)
            if found is not None:
                return Rejected(f"nearly {index.places[found[0]]} (similarity {found[1]:.2f})")
        return item
