"""Hugging Face's layout: config.json, and safetensors in one file or in shards with an index."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jindo_core.architectures import read_config
from jindo_core.errors import InputError
from jindo_core.files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class SafetensorsCheckpoint:
    """A folder in Hugging Face's layout: config.json and one model.safetensors, or an index and its shards."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
            raise InputError(f"{folder} is a LoRA adapter: give it as --lora_weights, and its base as --base_model")
        self.config = read_config(read_json(folder / "config.json"))
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        for file, names in _shards(folder).items():
            opened = self._open(file)
            held = set(opened.keys())
            if names is not None and names != held:
                odd = sorted(names ^ held)[0]
                fault = "lacks" if odd in names else "holds, beyond what the index says,"
                raise InputError(f"{file} {fault} the tensor {odd}: download the checkpoint again")
            for name in sorted(held):
                piece = opened.get_slice(name)
                if name in self._files:
                    raise InputError(f"the tensor {name} is in two shards of {folder}")
                if piece.get_dtype() not in FLOATS:
                    raise InputError(
                        f"the tensor {name} in {file} is of type {piece.get_dtype()}, expected {', '.join(FLOATS)}"
                    )
                self._files[name] = file
                self.shapes[name] = tuple(piece.get_shape())

    def read(self, name: str) -> Tensor:
        # Opened for each tensor: the file's pages that were read stay in memory as long as its mapping does.
        with self._open(self._files[name]) as opened:
            return opened.get_tensor(name)

    @staticmethod
    def _open(file: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(file, framework="pt")
        except FileNotFoundError:
            raise InputError(f"{file} is missing: download the checkpoint again") from None
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is truncated or corrupt ({error}): download it again") from None


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """Each file of the checkpoint and the tensors it should hold (None: whatever it holds)."""
    if (folder / SINGLE).exists():
        return {folder / SINGLE: None}
    if not (folder / INDEX).exists():
        raise InputError(f"{folder} holds neither {SINGLE} nor {INDEX}: expected safetensors (.bin can't be read)")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{folder / INDEX} has no weight_map: download it again")
    shards: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        # A name only, never a path: an index from elsewhere must not make us read outside its folder.
        if not isinstance(file, str) or file != re.sub(r"[/\\\0]", "", file) or file in ("", ".", ".."):
            raise InputError(f"{folder / INDEX} places {name} in {file!r}, expected the name of a file beside it")
        names = shards.setdefault(folder / file, set())
        assert names is not None
        names.add(name)
    return shards
