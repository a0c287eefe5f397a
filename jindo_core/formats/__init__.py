"""Checkpoints on disk, read one tensor at a time under Hugging Face's names. A module a format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from jindo_core.causal_lm import ModelConfig
from jindo_core.errors import InputError
from jindo_core.formats.gguf import GGUFCheckpoint
from jindo_core.formats.huggingface import HuggingFaceCheckpoint
from jindo_core.formats.meta import PARAMS, MetaCheckpoint, is_meta
from jindo_core.nf4 import NF4Weight


class Checkpoint(Protocol):
    """A model's configuration and its weights, known without reading data; then one weight at a time.

    Attributes:
        shapes: {name: shape} of every weight, under Hugging Face's names; of a quantized one, the shape it stands for.
        quantized: names of the weights that lie in NF4.
        files: the files with the weights. nbytes: of all of them.
    """

    shapes: dict[str, tuple[int, ...]]
    quantized: frozenset[str]
    files: list[Path]
    nbytes: int

    @property
    def config(self) -> ModelConfig:
        """The model's."""
        ...

    def read(self, name: str) -> Tensor:
        """A weight on the CPU, in memory of its own; a quantized one is dequantized, in the dtype it names.

        Raises:
            InputError: its bytes can't be read, or are not those that were written.
        """
        ...

    def read_nf4(self, name: str) -> NF4Weight:
        """A quantized weight, its bytes as they are. Only of names in `quantized`; raises as `read`."""
        ...

    def dtype_of(self, name: str) -> torch.dtype:
        """What `read` gives a weight in."""
        ...

    def nbytes_of(self, name: str) -> int:
        """Bytes that `read` (`read_nf4` of a quantized one) needs for a weight."""
        ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a .gguf file, or a folder in Hugging Face's or in Meta's layout. Nothing but headers is read.

    Raises:
        InputError: none of these, a corrupt file, or an unknown architecture; names the file and the tensor.
    """
    if path.suffix == ".gguf":
        return GGUFCheckpoint(path)
    if is_meta(path):
        return MetaCheckpoint(path)
    if not (path / "config.json").exists() and (path / "consolidated.00.pth").exists():
        raise InputError(f"{path} holds consolidated.00.pth but no {PARAMS}: copy it there from the model's source")
    return HuggingFaceCheckpoint(path)


def missing_and_extra(
    expected: dict[str, tuple[int, ...]], checkpoint: Checkpoint, ignore: Callable[[str], bool]
) -> Iterator[str]:
    """One sentence for every tensor that is missing, not known, or of another shape."""
    for name, shape in expected.items():
        if name not in checkpoint.shapes:
            yield f"the tensor {name} is missing"
        elif checkpoint.shapes[name] != shape:
            yield f"the tensor {name} has shape {checkpoint.shapes[name]}, expected {shape}"
    for name in checkpoint.shapes:
        if name not in expected and not ignore(name):
            yield f"the tensor {name} belongs to no part of the model"
