"""Near duplicates among many texts: shingles, MinHash signatures, and pairs of rows that share a band of them.

A text's signature holds for each of k hash functions the least value among its shingles; two texts agree in a place
with a probability equal to the Jaccard similarity of their sets of shingles (Broder 1997). Signatures cut into b
bands of r places find pairs that agree in at least one band (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets,
ch. 3). Signatures are datasketch's. Its index, a dictionary a band, takes gigabytes for a million rows: bands are
sorted here, in arrays.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from datasketch import MinHash

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_WINDOW = 8  # rows that share a band are compared with this many after them, and with the first
_CHUNK = 1 << 16  # rows, or pairs, at a time: a few tens of MB


@functools.cache
def _folding() -> np.ndarray:
    """uint32 [65536]: each character of the basic plane in small letters, 0 where it is no letter or digit."""
    table = np.zeros(0x10000, dtype=np.uint32)
    for code in range(0x10000):
        character = chr(code)
        if character.isalnum() or unicodedata.category(character)[0] == "M":
            lower = character.lower()
            table[code] = ord(lower) if len(lower) == 1 else code
    return table


def folded(text: str) -> np.ndarray:
    """uint32 [characters]: a text's letters and digits in small letters, compatibility forms composed (NFKC).

    Blanks are left out with the punctuation: Korean is spaced as its writer likes.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    table = _folding()
    if codes.size and codes.max() >= 0x10000:
        beyond = codes >= 0x10000
        codes = np.where(beyond, codes, table[np.where(beyond, 0, codes)])
    else:
        codes = table[codes]
    return codes[codes != 0]


def shingles(codes: np.ndarray, size: int) -> np.ndarray:
    """uint32 [characters - size + 1]: a hash of each run of `size` characters; of the whole text where it is shorter.

    A run that occurs twice is there twice.
    """
    size = max(min(size, len(codes)), 1)
    count = len(codes) - size + 1
    if count <= 0 or not len(codes):
        return np.empty(0, dtype=np.uint32)
    hashes = codes[:count].astype(np.uint64)
    for place in range(1, size):
        hashes *= _MULTIPLIER
        hashes += codes[place : place + count]
    hashes *= _MULTIPLIER
    return (hashes >> np.uint64(32)).astype(np.uint32)


@functools.cache
def _empty(count: int) -> MinHash:
    """datasketch's signature of nothing; its copies share the hash functions, whose making takes longer than a row."""
    from datasketch import MinHash

    return MinHash(count, hashfunc=int, scheme="affine32")


def signature(hashes: np.ndarray, count: int) -> np.ndarray:
    """uint32 [count]: the least value of each hash function among the shingles; the greatest number without any."""
    minhash = _empty(count).copy()
    for start in range(0, len(hashes), 512):  # products that fit the cache
        minhash.update_batch(hashes[start : start + 512].tolist())
    return np.asarray(minhash.hashvalues, dtype=np.uint32)


def bands(threshold: float, count: int, recall: float = 0.95) -> tuple[int, int]:
    """Bands and places in each, for signatures of `count` places.

    The most places a band with which a pair at the threshold is still found with a probability of `recall`: what is
    found too much is sorted out by the whole signatures, what is missed is lost. (datasketch weighs the two alike:
    9 bands of 13 at 0.8, which finds 40% of the pairs there.)
    """
    best = (count, 1)
    for rows in range(1, count + 1):
        number = count // rows
        if 1.0 - (1.0 - threshold**rows) ** number >= recall:
            best = (number, rows)
    return best


def band_hashes(signatures: np.ndarray, first: int, rows: int, number: int = 1) -> np.ndarray:
    """uint64 [n, number]: a hash of each of `number` bands of `rows` places from `first` on, of signatures [n, count].

    The same places' values in another band hash to something else, so that all bands may lie in one table.
    """
    hashes = np.empty((len(signatures), number), dtype=np.uint64)
    seeds = np.arange(first, first + number * rows, rows, dtype=np.uint64) + np.uint64(1)
    for start in range(0, len(signatures), _CHUNK // number):
        part = signatures[start : start + _CHUNK // number, first : first + number * rows]
        part = part.reshape(len(part), number, rows).astype(np.uint64)
        value = np.broadcast_to(seeds, (len(part), number))
        for place in range(rows):
            value = (value ^ part[:, :, place]) * _MULTIPLIER
            value ^= value >> np.uint64(29)
        hashes[start : start + len(part)] = value
    return hashes


def near_duplicates(signatures: np.ndarray, threshold: float) -> Iterator[tuple[int, int]]:
    """Rows that resemble an earlier one that stays.

    A row goes where its signature agrees with that of an earlier row that stays in at least `threshold` of its places;
    so a chain of rows, each a little different from the one before, is thinned and not lost but for its first. Beside
    the signatures (memory-mapped) it takes some 30 bytes a row and 32 a pair found.

    Args:
        signatures: [n, count], of any unsigned type.
    Yields:
        A row and the earlier one it resembles, rows ascending.
    """
    resembles = np.full(len(signatures), -1, dtype=np.int64)
    while True:
        staying = np.flatnonzero(resembles < 0)
        earlier, later, crowded = _similar_pairs(signatures, staying, threshold)
        order = np.lexsort((earlier, later))
        found = False
        for one, other in zip(earlier[order].tolist(), later[order].tolist(), strict=True):
            if resembles[other] < 0 and resembles[one] < 0:
                resembles[other] = one
                found = True
        # Rows of a crowded band were compared with a few of it only; with fewer rows there, others meet.
        if not (crowded and found):
            break
    for row in np.flatnonzero(resembles >= 0).tolist():
        yield row, int(resembles[row])


def _similar_pairs(signatures: np.ndarray, rows: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, bool]:
    """Pairs of `rows` that share a band and agree in `threshold` of all places; and whether some were left unseen."""
    count = signatures.shape[1]
    number, places = bands(threshold, count)
    needed = int(np.ceil(threshold * count - 1e-9))
    found: list[np.ndarray] = []
    crowded = False
    chosen = signatures if len(rows) == len(signatures) else None
    for band in range(number):
        if chosen is not None:
            hashes = band_hashes(chosen, band * places, places)[:, 0]
        else:
            hashes = np.concatenate(
                [
                    band_hashes(signatures[rows[start : start + _CHUNK]], band * places, places)[:, 0]
                    for start in range(0, len(rows), _CHUNK)
                ]
                or [np.empty(0, dtype=np.uint64)]
            )
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        order = rows[order]
        for one, other, unseen in _in_runs(hashes):
            crowded |= unseen
            pairs = np.stack([order[one], order[other]])
            found.append(_agreeing(signatures, pairs, needed))
    pairs = np.unique(np.concatenate(found, axis=1), axis=1) if found else np.empty((2, 0), dtype=np.int64)
    return pairs[0], pairs[1], crowded


def _in_runs(hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Places of sorted hashes to compare with each other: each with the next few and the first of the same hash."""
    same = hashes[1:] == hashes[:-1]
    if not same.any():
        return
    starts = np.flatnonzero(np.concatenate([[True], ~same]))
    lengths = np.diff(np.append(starts, len(hashes)))
    first = np.repeat(starts, lengths)
    place = np.arange(len(hashes))
    for distance in range(1, _WINDOW + 1):
        one = place[:-distance][first[:-distance] == first[distance:]]
        if not len(one):
            return
        yield one, one + distance, False
    far = place[place - first > _WINDOW]
    yield first[far], far, len(far) > 0


def _agreeing(signatures: np.ndarray, pairs: np.ndarray, needed: int) -> np.ndarray:
    """Those of `pairs` [2, n] whose signatures agree in at least `needed` places."""
    kept = []
    for start in range(0, pairs.shape[1], _CHUNK // 8):
        part = pairs[:, start : start + _CHUNK // 8]
        agree = (signatures[part[0]] == signatures[part[1]]).sum(axis=1)
        kept.append(part[:, agree >= needed])
    return np.concatenate(kept, axis=1) if kept else pairs[:, :0]
