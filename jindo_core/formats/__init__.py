"""Checkpoints on disk, read one tensor at a time under Hugging Face's names. A module a format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from torch import Tensor

from jindo_core.causal_lm import ModelConfig
from jindo_core.formats.gguf import GGUFCheckpoint
from jindo_core.formats.huggingface import SafetensorsCheckpoint


class Checkpoint(Protocol):
    """A model's configuration and its tensors.

    `shapes` maps every tensor's name to its shape, known without reading data; `read` gives one tensor.
    """

    shapes: dict[str, tuple[int, ...]]

    @property
    def config(self) -> ModelConfig: ...

    def read(self, name: str) -> Tensor: ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a .gguf file, or a folder with config.json and safetensors.

    Raises:
        InputError: neither, a corrupt file, or an unknown architecture; names the file and the tensor.
    """
    return GGUFCheckpoint(path) if path.suffix == ".gguf" else SafetensorsCheckpoint(path)


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
