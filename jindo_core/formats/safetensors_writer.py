"""Writing safetensors, a tensor at a time: in one file, or in shards with an index, as Hugging Face names them.

The safetensors package takes a whole file's tensors at once. Here a file's header is left room for, the tensors follow
as they come, and the header is written last, padded with spaces as the format allows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from jindo_core.errors import InputError
from jindo_core.formats.checksums import checksum, checksum_metadata, verify
from jindo_core.formats.safetensors_file import DTYPES, read_header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ENTRY_ROOM = 160
"""Bytes a tensor's header entry needs beyond its name: dtype, four sizes and two offsets of 15 digits."""
_CHECKSUM_ROOM = 24


class SafetensorsWriter:
    """Writes tensors in a given order, one in memory at a time; a context manager.

    Args:
        folder: the files go into; model.safetensors, or shards and model.safetensors.index.json.
        sizes: {name: bytes} of every tensor that will come, in order; a size may be an upper bound.
        max_shard_size: bytes of tensors in a file; a larger tensor has a file of its own.
        checksums: keep a checksum of every tensor in its file's metadata (our own format).
        stem: of the file's name, or the shards'.
    Attributes:
        written: {name: (file, checksum)}.
    """

    def __init__(
        self, folder: Path, sizes: Mapping[str, int], max_shard_size: int, *, checksums: bool = False,
        stem: str = "model",
    ) -> None:  # fmt: skip
        self.written: dict[str, tuple[Path, str]] = {}
        self._checksums, self._index = checksums, folder / f"{stem}.safetensors.index.json"
        self._folder = folder
        self._shards = _divide(sizes, max_shard_size)
        count = len(self._shards)
        self._files = [
            folder / (f"{stem}.safetensors" if count == 1 else f"{stem}-{i:05d}-of-{count:05d}.safetensors")
            for i in range(1, count + 1)
        ]
        self._open: BinaryIO | None = None
        self._entries: dict[str, Any] = {}
        self._room = self._at = self._total = 0

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        elif self._open is not None:
            self._open.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor, from the CPU."""
        if self._open is None:
            self._start()
        assert self._open is not None
        expected = self._shards[0][len(self._entries)]
        if name != expected:
            raise ValueError(f"{name} came, expected {expected}: tensors are written in the order that was given")
        data = tensor.detach().contiguous()
        self._open.write(data.view(-1).view(torch.uint8).numpy().data)
        self._entries[name] = {
            "dtype": NAMES[data.dtype],
            "shape": list(data.shape),
            "data_offsets": [self._at, self._at + data.nbytes],
        }
        self._at += data.nbytes
        self._total += data.nbytes
        self.written[name] = (self._files[0], checksum(data))
        if len(self._entries) == len(self._shards[0]):
            self._close_shard()

    def _start(self) -> None:
        names = self._shards[0]
        per_name = _ENTRY_ROOM + (_CHECKSUM_ROOM if self._checksums else 0)
        twice = 2 if self._checksums else 1
        self._room = 256 + sum(per_name + twice * len(json.dumps(name)) for name in names)
        self._room += -self._room % 8  # the data begins at a multiple of 8
        self._open = open(self._files[0], "wb")  # noqa: SIM115 - closed when the shard is full, or by __exit__
        self._open.seek(8 + self._room)
        self._entries, self._at = {}, 0

    def _close_shard(self) -> None:
        assert self._open is not None
        if self._checksums:
            metadata = checksum_metadata({name: self.written[name][1] for name in self._entries})
        else:
            metadata = {"format": "pt"}
        header = json.dumps({"__metadata__": metadata, **self._entries}, separators=(",", ":")).encode()
        assert len(header) <= self._room, "a header larger than the room that was left for it"
        self._open.seek(0)
        self._open.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._open.close()
        self._open = None
        self._shards.pop(0)
        self._files.pop(0)

    def _finish(self) -> None:
        if self._shards:
            raise ValueError(f"{self._shards[0][len(self._entries)]} was announced and never written")
        files = {file for file, _ in self.written.values()}
        if len(files) > 1:
            weight_map = {name: file.name for name, (file, _) in sorted(self.written.items())}
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            self._index.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _divide(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names by file, in order; a file is full when the next tensor would make it larger than `limit`."""
    shards: list[list[str]] = []
    held = 0
    for name, size in sizes.items():
        if not shards or held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def verify_safetensors(written: Mapping[str, tuple[Path, str]]) -> None:
    """Read every tensor back and compare its bytes with what was written.

    Raises:
        InputError: one differs, is missing, or is not alone.
    """
    for file in dict.fromkeys(file for file, _ in written.values()):
        expected = {name: digest for name, (place, digest) in written.items() if place == file}
        places = read_header(file).places
        _same_names(places, expected, file)
        for name, digest in expected.items():
            verify(name, places[name].read(), digest, file)


def _same_names(found: Iterable[str], expected: Iterable[str], file: Path) -> None:
    if odd := set(found) ^ set(expected):
        raise InputError(f"{file} read back differs in the tensor {sorted(odd)[0]}: the disk is faulty")
