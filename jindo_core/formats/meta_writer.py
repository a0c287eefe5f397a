"""Writing Meta's format: consolidated.00.pth, as torch.save would, and params.json.

torch.save takes all tensors at once. Here its archive is written a tensor at a time: a zip file, not compressed, of a
pickle that describes the tensors, and the bytes of each in an entry of its own that begins at a multiple of 64.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jindo_core.errors import InputError
from jindo_core.formats.checksums import checksum, verify

WEIGHTS, PARAMS = "consolidated.00.pth", "params.json"
_ALIGNMENT = 64
_ZIP64_EXTRA, _LOCAL_HEADER = 20, 30
_STORAGE = {torch.float32: "FloatStorage", torch.float16: "HalfStorage", torch.bfloat16: "BFloat16Storage"}


@dataclass(frozen=True)
class _Described:
    """A tensor to be written: its place in the archive, and what it is."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class _Storage:
    def __init__(self, tensor: _Described) -> None:
        self.tensor = tensor


class _Pickler(pickle.Pickler):
    """Pickles `_Described` as torch pickles a contiguous tensor."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, _Described):
            return NotImplemented
        strides, step = [], 1
        for size in reversed(value.shape):
            strides.insert(0, step)
            step *= size
        return (
            torch._utils._rebuild_tensor_v2,
            (_Storage(value), 0, value.shape, tuple(strides), False, OrderedDict()),
        )

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        count = 1
        for size in value.tensor.shape:
            count *= size
        return ("storage", getattr(torch, _STORAGE[value.tensor.dtype]), value.tensor.key, "cpu", count)


def write_pth(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, tensors: Iterator[Tensor]) -> dict[str, str]:
    """Write a state dict that torch.load(weights_only=True) reads, one tensor in memory at a time.

    Args:
        shapes: of all tensors, in the order in which `tensors` gives them. dtype: of all, fp32, fp16 or bf16.
    Returns:
        {name: checksum} of what was written.
    """
    described = {name: _Described(str(i), dtype, shape) for i, (name, shape) in enumerate(shapes.items())}
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=2).dump(OrderedDict(described))
    root = file.stem
    digests = {}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _entry(archive, f"{root}/data.pkl", memoryview(pickled.getvalue()))
        _entry(archive, f"{root}/byteorder", memoryview(sys.byteorder.encode()))
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}")
            digests[name] = checksum(tensor)
            data = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
            _entry(archive, f"{root}/data/{described[name].key}", data)
        _entry(archive, f"{root}/version", memoryview(b"3\n"))
    return digests


def _entry(archive: zipfile.ZipFile, name: str, data: memoryview) -> None:
    entry = zipfile.ZipInfo(name)  # dated 1980: the same weights make the same file
    entry.file_size = data.nbytes
    assert archive.fp is not None
    begin = archive.fp.tell() + _LOCAL_HEADER + len(name) + _ZIP64_EXTRA + 4
    padding = -begin % _ALIGNMENT
    entry.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(entry, "w", force_zip64=True) as opened:
        opened.write(data)


def verify_pth(file: Path, digests: Mapping[str, str]) -> None:
    """Read every tensor back, as others do, and compare its bytes with what was written.

    Raises:
        InputError: one differs, is missing, or is not alone.
    """
    try:
        found = torch.load(file, weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise InputError(f"{file} can't be read back ({str(error).splitlines()[0]}): the disk is faulty") from None
    if odd := found.keys() ^ digests.keys():
        raise InputError(f"{file} read back differs in the tensor {sorted(odd)[0]}: the disk is faulty")
    for name, digest in digests.items():
        verify(name, found[name], digest, file)
