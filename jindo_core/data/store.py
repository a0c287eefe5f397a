"""Tokenized rows on disk: made once for a file, a format and an encoder, then read a row at a time.

A store is one file: a number for every token, the id where it is supervised and ~id where it is not; after them each
record's length (0: left out), its row, and what of it was cut; then a footer with sizes and a checksum, by which a
damaged one is noticed. Rows are read, not mapped: pages of a map would count as the process's memory. What stays in
memory is 12 bytes a record.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import struct
import tempfile
import time
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache as once
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from jindo_core.data.examples import IGNORE, Encoded, Example, Losses
from jindo_core.data.formats import Format
from jindo_core.data.lazy import LazySequence
from jindo_core.data.readers import RowSource
from jindo_core.data.records import Record
from jindo_core.errors import InputError

KEPT_BYTES = 20_000_000_000
"""Of all stores in the cache together: the ones that were not used for longest go first."""

_CHUNK = 1024  # records that are read, and encoded, at once, at most;
_CHUNK_CHARACTERS = 1 << 19  # or so many of text, and the record that goes beyond: a token takes a hundred bytes
_MAGIC = b"jindo-t1"
_TAIL = struct.Struct("<Q8s")  # the footer's length, and the magic
_STALE = 24 * 3600.0  # seconds after which a part that nobody wrote to is a killed run's
_BUFFER = 4 << 20
_END, _PROMPT = 1, 2  # what of a record was cut

Progress = Callable[[int, int, int], None]
"""Told how far tokenizing is: rows, bytes read, bytes in all."""


class RowEncoder(Protocol):
    """What is asked of `examples.Encoder`."""

    @property
    def fingerprint(self) -> str: ...
    def encode(self, records: Sequence[Record]) -> list[Encoded]: ...


class TokenizedRows(LazySequence[Example]):
    """The records of one source. One that was left out has no tokens.

    Attributes:
        lengths: int32, tokens of each. from_cache: whether it was there already.
        checksum: CRC-32 of all tokens, labels and row numbers.
    """

    def __init__(self, file: IO[bytes], count: int, tokens: int, checksum: int, *, from_cache: bool) -> None:
        self._file, self.checksum, self.from_cache = file, checksum, from_cache
        self.lengths = np.frombuffer(self._read(4 * tokens, 4 * count), "<i4")
        self._ends = np.cumsum(self.lengths, dtype=np.int64)
        self._behind = 4 * tokens + 4 * count

    def __len__(self) -> int:
        return len(self.lengths)

    def _at(self, index: int) -> Example:
        length, end = int(self.lengths[index]), int(self._ends[index])
        held = np.frombuffer(self._read(4 * (end - length), 4 * length), "<i4")
        unseen = held < 0
        return Example(np.where(unseen, ~held, held).tolist(), np.where(unseen, IGNORE, held).tolist())

    @property
    def rows(self) -> NDArray[np.int32]:
        """int32: each record's row in its file, from 1."""
        return np.frombuffer(self._read(self._behind, 4 * len(self)), "<i4")

    def losses(self, chosen: NDArray[np.int64]) -> Losses:
        """Of the chosen records, their rows in the order of the file."""
        cut = np.frombuffer(self._read(self._behind + 4 * len(self), len(self)), np.uint8)[chosen]
        rows, there = self.rows[chosen], self.lengths[chosen] > 0

        def of(these: NDArray[np.bool_]) -> array[int]:  # an array: all rows of a large file may be among them
            return array("i", np.sort(rows[these]).astype(np.intc).tobytes())

        end, prompt = cut & _END > 0, cut & _PROMPT > 0
        gone = end | prompt
        return Losses(
            filled=of(~there & gone), empty=of(~there & ~gone), cut=of(there & end), shortened=of(there & prompt)
        )

    def _read(self, start: int, size: int) -> bytes:
        parts = []
        while size:
            part = os.pread(self._file.fileno(), size, start)
            if not part:
                raise InputError("a file of tokenized rows was cut short while it was in use: start the run again")
            parts.append(part)
            start, size = start + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def tokenize(
    source: RowSource,
    row_format: Format,
    encoder: RowEncoder,
    *,
    cache: Path | None,
    on_progress: Progress | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> TokenizedRows:
    """The rows of a source as ids and labels, from the cache where they are there.

    Args:
        cache: the folder of stores; None: a file without a name, gone with the process. A folder that can't be written
            to is said, and does without.
        say: is told what a person should know: no cache, a damaged one, old ones removed.
    Raises:
        InputError: rows that can't be read or don't fit their format, no room, or a file that changed meanwhile.
    """
    if cache is None or not _usable(cache, say):
        return _build(source, row_format, encoder, None, "", on_progress)
    before = _stamps(source)
    key = _key(source, row_format, encoder)
    path = cache / f"{key}.rows"
    if (found := _open(path, key, say)) is not None:
        with contextlib.suppress(OSError):  # somebody else's cache: it is used all the same
            os.utime(path)
        return found
    made = _build(source, row_format, encoder, path, key, on_progress, lambda: _stamps(source) == before)
    _prune(cache, path, say)
    return made


def _usable(cache: Path, say: Callable[[str], None]) -> bool:
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)  # rows are their owner's alone
        with tempfile.TemporaryFile(dir=cache):
            return True
    except OSError as error:
        say(f"tokenized rows are not kept for the next run: their cache can't be written to ({error.strerror})")
        return False


def _stamps(source: RowSource) -> list[tuple[int, int]]:
    return [(found.st_size, found.st_mtime_ns) for found in (path.stat() for path in source.paths)]


def _key(source: RowSource, row_format: Format, encoder: RowEncoder) -> str:
    """Of all that the rows depend on, this package's code among it."""
    said = [_MAGIC.decode(), _code(), source.digest(), row_format.name, repr(row_format.mapped), encoder.fingerprint]
    return hashlib.sha256("\0".join(said).encode()).hexdigest()


@once
def _code() -> str:
    folder = Path(__file__).parent
    sources = [*sorted(folder.glob("*.py")), folder.parent / "tokenizer.py"]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()


# --- writing --------------------------------------------------------------------------------------------


def _build(
    source: RowSource, row_format: Format, encoder: RowEncoder, path: Path | None, key: str,
    on_progress: Progress | None, unchanged: Callable[[], bool] = lambda: True,
) -> TokenizedRows:  # fmt: skip
    """Encode all rows into a file: `path`, whole or not at all; or one without a name."""
    part, file = None, None
    try:
        with _room(path):
            if path is None:
                file = tempfile.TemporaryFile(prefix="jindo-rows-")  # noqa: SIM115
            else:
                descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:16]}.", suffix=".part")
                file = os.fdopen(descriptor, "w+b")
        count, tokens, check = _write(file, path, _encoded(source, row_format, encoder, on_progress), key)
        if not unchanged():
            raise InputError(f"{source.paths[0]} changed while it was read: start the run again")
        if path is not None and part is not None:
            with _room(path):
                os.fsync(file.fileno())
                os.replace(part, path)  # of two runs at once the later one's stands; both hold the same
        rows, file = TokenizedRows(file, count, tokens, check, from_cache=False), None
        return rows
    finally:
        if file is not None:
            with contextlib.suppress(OSError):  # the error that is on its way says more
                file.close()
        if part is not None:
            Path(part).unlink(missing_ok=True)


@contextlib.contextmanager
def _room(path: Path | None) -> Iterator[None]:
    """What fails while a store is written, in one line."""
    try:
        yield
    except OSError as error:
        where = "the folder for temporary files (TMPDIR)" if path is None else "the cache (JINDO_CACHE)"
        raise InputError(
            f"tokenized rows can't be written to {where} ({error.strerror}): make room, or name another folder"
        ) from error


def _encoded(
    source: RowSource, row_format: Format, encoder: RowEncoder, on_progress: Progress | None
) -> Iterator[list[Encoded]]:
    """Chunk by chunk; a thread reads the next one while this one is encoded."""
    records, done, size = (row_format.record(row) for row in source), 0, source.size_bytes

    def read() -> tuple[list[Record], int]:
        return _chunk(records), source.bytes_read

    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(read)
        while True:
            chunk, position = coming.result()
            if not chunk:
                return
            coming = reader.submit(read)
            yield encoder.encode(chunk)
            done += len(chunk)
            if on_progress is not None:
                on_progress(done, position, size)


def _chunk(records: Iterator[Record]) -> list[Record]:
    """The next records, as many as are encoded at once: few where they are long."""
    chunk, characters = [], 0
    for record in itertools.islice(records, _CHUNK):
        chunk.append(record)
        rounds = record.rounds
        characters += len(record.system) + sum(len(r.instruction) + len(r.input) + len(r.output) for r in rounds)
        if characters >= _CHUNK_CHARACTERS:
            break
    return chunk


def _write(file: IO[bytes], path: Path | None, chunks: Iterator[list[Encoded]], key: str) -> tuple[int, int, int]:
    """Returns the number of records, of tokens, and the checksum of all."""
    lengths, rows, cut, check, size = array("i"), array("i"), bytearray(), 0, 0

    def put(data: bytes) -> None:
        nonlocal check, size
        with _room(path):
            file.write(data)
        check, size = zlib.crc32(data, check), size + len(data)

    for chunk in chunks:
        put(_flat([one.example for one in chunk if one.example is not None]))
        lengths.extend(0 if one.example is None else len(one.example.input_ids) for one in chunk)
        rows.extend(one.row for one in chunk)
        cut.extend(_END * one.cut | _PROMPT * one.shortened for one in chunk)
    tokens = size // 4
    for numbers in (lengths, rows):
        put(np.asarray(numbers, "<i4").tobytes())
    put(bytes(cut))
    meta = {"key": key, "records": len(lengths), "tokens": tokens, "crc32": check}
    footer = json.dumps(meta).encode()
    with _room(path):
        file.write(footer + _TAIL.pack(len(footer), _MAGIC))
        file.flush()
    return len(lengths), tokens, check


def _flat(examples: Sequence[Example]) -> bytes:
    """The tokens of examples one after another: id, or ~id without a label."""
    count = sum(len(example.input_ids) for example in examples)
    chain = itertools.chain.from_iterable
    ids = np.fromiter(chain(example.input_ids for example in examples), "<i4", count)
    labels = np.fromiter(chain(example.labels for example in examples), "<i4", count)
    return np.where(labels == IGNORE, ~ids, ids).astype("<i4").tobytes()


# --- the cache ------------------------------------------------------------------------------------------


def _open(path: Path, key: str, say: Callable[[str], None]) -> TokenizedRows | None:
    """The store of this key; None where there is none that is whole."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    except OSError as error:
        say(f"tokenized rows of an earlier run can't be read ({error.strerror}): they are made anew")
        return None
    meta = _footer(file, key)
    if meta is None:
        file.close()
        say("tokenized rows of an earlier run are damaged: they are made anew")
        return None
    return TokenizedRows(file, meta["records"], meta["tokens"], meta["crc32"], from_cache=True)


def _footer(file: IO[bytes], key: str) -> dict[str, Any] | None:
    """The footer, if sizes, key and checksum agree with it."""
    whole = os.fstat(file.fileno()).st_size
    if whole < _TAIL.size:
        return None
    file.seek(whole - _TAIL.size)
    length, magic = _TAIL.unpack(file.read(_TAIL.size))
    held = whole - _TAIL.size - length
    if magic != _MAGIC or held < 0:
        return None
    file.seek(held)
    try:
        meta = json.loads(file.read(length))
    except ValueError:
        return None
    if not isinstance(meta, dict) or meta.get("key") != key:
        return None
    numbers = [meta.get(name) for name in ("records", "tokens", "crc32")]
    if not all(isinstance(n, int) and n >= 0 for n in numbers) or held != 4 * meta["tokens"] + 9 * meta["records"]:
        return None
    return meta if _checksum(file, held) == meta["crc32"] else None


def _checksum(file: IO[bytes], size: int) -> int:
    file.seek(0)
    found = 0
    while size > 0 and (data := file.read(min(_BUFFER, size))):
        found, size = zlib.crc32(data, found), size - len(data)
    return found


def _prune(cache: Path, own: Path, say: Callable[[str], None]) -> None:
    """Keep KEPT_BYTES at most, without the store in use; and nothing of runs that were killed while they wrote."""
    held: list[tuple[float, int, Path]] = []
    for path in cache.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another run prunes too
            found = path.stat()
            if path.suffix == ".rows":
                held.append((found.st_mtime, found.st_size, path))
            elif path.suffix == ".part" and time.time() - found.st_mtime > _STALE:
                path.unlink()
    total, removed = sum(size for _, size, _ in held), [0, 0]
    for _, size, path in sorted(held):
        if total <= KEPT_BYTES or path == own:
            continue
        try:
            path.unlink(missing_ok=True)
        except PermissionError:
            continue  # another user's, in a cache that is shared: theirs to keep
        total, removed = total - size, [removed[0] + 1, removed[1] + size]
    if removed[0]:
        freed = f"{removed[1] / 1e9:,.1f} GB"
        say(f"{removed[0]} of the tokenized data sets kept for next runs removed, the oldest: {freed}")


# --- several sources ------------------------------------------------------------------------------------


class Selection(LazySequence[Example]):
    """Some of the records of several sources, source by source; those that were left out are not among them.

    Args:
        sources: side by side. chosen: which records, counted through all sources, in the order that they shall have
            within theirs.
    Attributes:
        lengths: int32, tokens of each. bounds: (start, end) of each source's examples.
        losses: for each source, which of the chosen records' rows were left out or cut.
        asked: for each source, how many records were chosen.
    """

    def __init__(self, sources: Sequence[TokenizedRows], chosen: NDArray[np.int64]) -> None:
        self._sources = tuple(sources)
        firsts = np.cumsum([0, *(len(source) for source in sources)])
        self.bounds: list[tuple[int, int]] = []
        self.losses: list[Losses] = []
        self.asked: list[int] = []
        kept, lengths, start = [], [], 0
        for source, first, end in zip(sources, firsts[:-1], firsts[1:], strict=True):
            here = chosen[(chosen >= first) & (chosen < end)] - first
            there = here[source.lengths[here] > 0]
            self.asked.append(len(here))
            self.losses.append(source.losses(here))
            kept.append(there)
            lengths.append(source.lengths[there])
            self.bounds.append((start, start + len(there)))
            start += len(there)
        self._chosen = np.concatenate(kept) if kept else np.zeros(0, np.int64)
        self.lengths = np.concatenate(lengths) if lengths else np.zeros(0, np.int32)

    def __len__(self) -> int:
        return len(self._chosen)

    def digest(self) -> str:
        """SHA-256 of what is read: the sources' contents, and which of their records."""
        whole = hashlib.sha256(repr([(len(source), source.checksum) for source in self._sources]).encode())
        whole.update(self._chosen.astype("<i8").tobytes())
        return whole.hexdigest()

    def origin(self, index: int) -> tuple[int, int]:
        """Which source an example is from, and its row there, from 1."""
        for number, (source, (start, end)) in enumerate(zip(self._sources, self.bounds, strict=True)):
            if start <= index < end:
                return number, int(source.rows[int(self._chosen[index])])
        raise IndexError(f"example {index} of {len(self)}")

    def _at(self, index: int) -> Example:
        for source, (start, end) in zip(self._sources, self.bounds, strict=True):
            if start <= index < end:
                return source[int(self._chosen[index])]
        raise AssertionError("bounds hold all examples")
