"""Hugging Face's layout: config.json, and weights as safetensors or .bin, in one file or in shards with an index."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from jindo_core.architectures import read_config
from jindo_core.errors import InputError
from jindo_core.files import read_json
from jindo_core.formats.bitsandbytes import assemble, check_quantization, group_parts, logical_shape
from jindo_core.formats.checksums import read_checksums, verify
from jindo_core.formats.places import FLOATS, Place, open_size
from jindo_core.formats.safetensors_file import read_header
from jindo_core.formats.torch_file import read_records
from jindo_core.nf4 import NF4Weight, described_state

LAYOUTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""(one file, the index of several), in order of preference."""


class _Shard(NamedTuple):
    """A weight file's {name: place}, and {name: checksum} where it is one of ours."""

    places: dict[str, Place]
    checksums: dict[str, str]


class HuggingFaceCheckpoint:
    """A folder in Hugging Face's layout; weights in 16 or 32 bits, or in bitsandbytes' or our own NF4.

    See `Checkpoint` for the attributes.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
            raise InputError(f"{folder} is a LoRA adapter: give it as --lora_weights, and its base as --base_model")
        raw = read_json(folder / "config.json")
        check_quantization(raw, folder / "config.json")
        self.config = read_config(raw)
        self._places: dict[str, Place] = {}
        self._checksums: dict[str, str] = {}
        shards = _shard_files(folder)
        self.files, self.nbytes = list(shards), sum(open_size(file) for file in shards)
        for file, names in shards.items():
            shard = _open_shard(file)
            _check_names(shard.places, names, file)
            twice = next((name for name in shard.places if name in self._places), None)
            if twice is not None:
                raise InputError(f"the tensor {twice} is in two shards of {folder}: download it again")
            self._places |= shard.places
            self._checksums |= shard.checksums
        self._parts = group_parts(self._places)
        self.quantized = frozenset(self._parts)
        self.shapes = self._read_shapes()

    def _read_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every weight; sees to the dtypes on the way."""
        parts = {part for names in self._parts.values() for part in names}
        shapes = {}
        for name, place in self._places.items():
            if name in self._parts:
                state = self._read_part(self._parts[name][-1])
                shapes[name] = logical_shape(name, state, place.file)
                if place.nbytes != (math.prod(shapes[name]) + 1) // 2:
                    raise InputError(
                        f"the NF4 weight {name} in {place.file} has {place.nbytes} bytes for the shape {shapes[name]}: "
                        "it is damaged, copy it again"
                    )
            elif name not in parts:
                if place.dtype not in FLOATS:
                    expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
                    found = str(place.dtype).removeprefix("torch.")
                    raise InputError(f"the tensor {name} in {place.file} is of type {found}, expected {expected}")
                shapes[name] = place.shape
        return shapes

    def read(self, name: str) -> Tensor:
        return self.read_nf4(name).dequantize() if name in self._parts else self._read_part(name)

    def read_nf4(self, name: str) -> NF4Weight:
        parts = {part: self._read_part(part) for part in self._parts[name]}
        return assemble(name, parts, self._places[name].file)

    def dtype_of(self, name: str) -> torch.dtype:
        if name not in self._parts:
            return self._places[name].dtype
        dtype: torch.dtype = getattr(torch, described_state(self._read_part(self._parts[name][-1]))["dtype"])
        return dtype

    def nbytes_of(self, name: str) -> int:
        return sum(self._places[part].nbytes for part in self._parts.get(name, [name]))

    def _read_part(self, name: str) -> Tensor:
        place = self._places[name]
        stretch = place.read_bytes()
        if name in self._checksums:
            verify(name, stretch, self._checksums[name], place.file)
        return place.view(stretch)


def _open_shard(file: Path) -> _Shard:
    if file.suffix == ".bin":
        return _Shard(read_records(file), {})
    header = read_header(file)
    checksums = read_checksums(header.metadata, file)
    if checksums is None:
        return _Shard(header.places, {})
    if odd := sorted(header.places.keys() ^ checksums.keys()):
        raise InputError(f"{file} has a tensor or a checksum of {odd[0]}, expected both: it is damaged, copy it again")
    return _Shard(header.places, checksums)


def _check_names(places: dict[str, Place], names: set[str] | None, file: Path) -> None:
    """See that a shard holds what the index says (None: no index, anything goes)."""
    if names is None or names == places.keys():
        return
    odd = sorted(names ^ places.keys())[0]
    fault = "lacks" if odd in names else "holds, beyond what the index says,"
    raise InputError(f"{file} {fault} the tensor {odd}: download the checkpoint again")


def _shard_files(folder: Path) -> dict[Path, set[str] | None]:
    """Each file of the checkpoint and the tensors it should hold (None: whatever it holds)."""
    for single, index in LAYOUTS:
        if (folder / single).exists():
            return {folder / single: None}
        if (folder / index).exists():
            return _indexed(folder, folder / index)
    expected = " nor ".join(name for pair in LAYOUTS for name in pair)
    raise InputError(f"{folder} holds neither {expected}: expected the model's weights beside its config.json")


def _indexed(folder: Path, index: Path) -> dict[Path, set[str] | None]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map: download it again")
    shards: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        # A name only, never a path: an index from elsewhere must not make us read outside its folder.
        if not isinstance(file, str) or file != re.sub(r"[/\\\0]", "", file) or file in ("", ".", ".."):
            raise InputError(f"{index} places {name} in {file!r}, expected the name of a file beside it")
        names = shards.setdefault(folder / file, set())
        assert names is not None
        names.add(name)
    return shards
