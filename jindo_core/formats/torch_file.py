"""A file of torch.save (.bin, .pth): a zip archive of a pickle and one record a storage, read as data, never as code.

torch.load unpickles it with weights_only onto the meta device, which gives shapes and offsets and reads no storage. The
archive's own table says where each record really lies: a tensor that needs more bytes than its record has is refused.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jindo_core.errors import InputError
from jindo_core.formats.places import Place, open_size

# What torch.load raises, beside what it says of pickles, on a file that is damaged or made to hurt.
TORCH_FAULTS = (
    RuntimeError, EOFError, ValueError, TypeError, AttributeError, KeyError, IndexError, AssertionError, OverflowError,
    MemoryError, RecursionError, struct.error,
)  # fmt: skip


def read_records(file: Path) -> dict[str, Place]:
    """{name: place} of the tensors in a state dict that torch.save wrote.

    Raises:
        InputError: the file is missing, truncated or of torch's old format; its pickle needs more than weights, or is
            no state dict; a tensor is larger than its storage, or a storage than its record.
    """
    records = _record_sizes(file, open_size(file))
    try:
        held = torch.load(file, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{file} needs more than weights ({_needed(error)}): take safetensors instead") from None
    except TORCH_FAULTS as error:
        raise InputError(f"{file} is truncated or corrupt ({_first_line(error)}): download it again") from None
    if not isinstance(held, dict) or not all(isinstance(name, str) for name in held):
        raise InputError(f"{file} holds a {type(held).__name__}, expected a state dict of names and tensors")
    return {name: _place(name, value, records, file) for name, value in held.items()}


def _record_sizes(file: Path, size: int) -> dict[int, int]:
    """{where a record's bytes begin: how many they are} of the archive, each seen to lie within the file."""
    records = {}
    try:
        with zipfile.ZipFile(file) as archive, open(file, "rb") as raw:
            for entry in archive.infolist():
                if not 0 <= entry.header_offset < size:
                    raise InputError(f"{file} is corrupt (the record {entry.filename}): download it again")
                raw.seek(entry.header_offset)
                name_length, extra_length = struct.unpack("<HH", raw.read(30)[26:30])
                start = entry.header_offset + 30 + name_length + extra_length
                if entry.compress_type != zipfile.ZIP_STORED or start + entry.file_size > size:
                    raise InputError(f"{file} is corrupt (the record {entry.filename}): download it again")
                if entry.filename.endswith("/byteorder") and archive.read(entry) != b"little":
                    raise InputError(f"{file} was saved on a big-endian machine: save it again on another")
                records[start] = entry.file_size
    except InputError:
        raise
    except (zipfile.BadZipFile, struct.error, NotImplementedError, ValueError) as error:
        raise InputError(
            f"{file} is truncated, or of the format before torch 1.6 ({_first_line(error)}): download it again, or "
            "save it again with a newer torch"
        ) from None
    return records


def _place(name: str, value: Any, records: dict[int, int], file: Path) -> Place:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
        raise InputError(f"{file} holds a {type(value).__name__} under {name}, expected a plain tensor")
    start = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    size = value.dtype.itemsize
    if value.numel() == 0:
        return Place(file, 0, 0, value.dtype, tuple(value.shape))
    if start not in records:
        raise InputError(f"the storage of {name} in {file} is no record of the archive: save it again with torch")
    if records[start] < value.untyped_storage().nbytes():
        raise InputError(f"the storage of {name} in {file} is larger than its record: the file is corrupt")
    last = value.storage_offset() + sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
    if value.numel() * size > records[start] or (last + 1) * size > records[start]:
        raise InputError(f"the tensor {name} in {file} needs more bytes than its storage has: the file is corrupt")
    first = start + int(value.storage_offset()) * size
    nbytes = int(last + 1 - value.storage_offset()) * size
    strides = None if value.is_contiguous() else tuple(value.stride())
    return Place(file, first, nbytes, value.dtype, tuple(value.shape), strides)


def _needed(error: pickle.UnpicklingError) -> str:
    """What a pickle asked for, from torch's long advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return (telling or lines or ["no more is said"])[0][:160]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:160] if str(error) else type(error).__name__
