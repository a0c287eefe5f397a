"""The header of a safetensors file, read strictly.

The safetensors package takes a key twice (the last wins) and any name; here the header must describe the file exactly:
unique names, tensors that lie one after the other without a gap or an overlap and end where the file does.
Format: 8 bytes of length, little-endian; so much JSON, {name: {"dtype", "shape", "data_offsets"}}, perhaps with
"__metadata__"; the bytes of the tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch

from jindo_core.errors import InputError
from jindo_core.formats.places import Place, open_size

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
LONGEST_HEADER = 100_000_000
"""Bytes; the safetensors package's own limit."""


class Header(NamedTuple):
    """What a safetensors file holds: {name: place}, and its metadata."""

    places: dict[str, Place]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """The header of a safetensors file, checked against the file's size.

    Raises:
        InputError: the file is missing, truncated or corrupt, or its header describes it wrongly.
    """
    size = open_size(file)
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or not 2 <= length <= min(LONGEST_HEADER, size - 8):
            raise _corrupt(file, f"{size} bytes with a header of {length}")
        text = opened.read(length)
    try:
        raw = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, file))
    except InputError:
        raise
    except (ValueError, RecursionError):  # no UTF-8, no JSON, a number of thousands of digits, or nested too deep
        raise _corrupt(file, "its header is no JSON") from None
    if not isinstance(raw, dict):
        raise _corrupt(file, "its header is no JSON object")
    metadata = raw.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _corrupt(file, "its metadata is no object of strings")
    places = {name: _place(name, entry, file, 8 + length) for name, entry in raw.items()}
    _check_layout(places, 8 + length, size, file)
    return Header(places, metadata)


def _corrupt(file: Path, fault: str) -> InputError:
    return InputError(f"{file} is truncated or corrupt ({fault}): download it again")


def _unique(pairs: Iterable[tuple[str, Any]], file: Path) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name, value in pairs:
        if name in entries:
            raise InputError(f"the header of {file} names {name!r} twice: download it again from a source you trust")
        entries[name] = value
    return entries


def _place(name: str, entry: Any, file: Path, base: int) -> Place:
    """A tensor's place from its header entry; `base`: where the tensors begin."""
    if not name or "/" in name or "\\" in name or "\0" in name:
        raise InputError(f"{file} holds a tensor called {name!r}, expected a name without slashes")
    entry = entry if isinstance(entry, dict) else {}
    kind, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise InputError(f"the tensor {name} in {file} is of type {kind}, expected one of {', '.join(DTYPES)}")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise _corrupt(file, f"the tensor {name} has shape {shape} and offsets {offsets}")
    dtype, nbytes = DTYPES[kind], offsets[1] - offsets[0]
    if math.prod(shape) * dtype.itemsize != nbytes:
        raise _corrupt(file, f"the tensor {name}, {kind} {shape}, has {nbytes} bytes")
    return Place(file, base + offsets[0], nbytes, dtype, tuple(shape))


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_layout(places: dict[str, Place], base: int, size: int, file: Path) -> None:
    end, before = base, "the header"
    for name, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if place.start != end:
            how = "overlaps" if place.start < end else "leaves a gap after"
            raise _corrupt(file, f"the tensor {name} {how} {before}")
        end, before = place.start + place.nbytes, name
    if end != size:
        raise _corrupt(file, f"{size} bytes, {end} in its header")
