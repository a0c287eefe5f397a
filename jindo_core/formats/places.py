"""Where a tensor's bytes lie in a file, and reading them; the same for every format whose tensors lie there plainly."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from jindo_core.errors import InputError

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""What a weight that is not quantized may be."""


@dataclass(frozen=True)
class Place:
    """A tensor in a file.

    Attributes:
        file: it lies in. start, nbytes: the stretch of bytes that holds all its elements.
        dtype, shape: the tensor's. strides: in elements, from the stretch's first byte; None: contiguous.
    """

    file: Path
    start: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    def read_bytes(self) -> Tensor:
        """The stretch, uint8 [nbytes]. Read, not mapped: a mapped file's pages would stay in memory beside the model.

        Raises:
            InputError: the file can't be opened, or is shorter than it was.
        """
        stretch = torch.empty(self.nbytes, dtype=torch.uint8)
        into = stretch.numpy().data
        try:
            with open(self.file, "rb", buffering=0) as opened:
                opened.seek(self.start)
                done = 0
                while done < self.nbytes and (count := opened.readinto(into[done:])):
                    done += count
        except OSError as error:
            raise InputError(f"{self.file} can't be read ({error.strerror}): expected a readable file") from None
        if done < self.nbytes:
            raise InputError(f"{self.file} became shorter while it was read: is it still being written?")
        return stretch

    def view(self, stretch: Tensor) -> Tensor:
        """The tensor within its bytes; contiguous, and never in the file's memory."""
        elements = stretch.view(self.dtype)
        if self.strides is None:
            return elements.view(self.shape)
        return elements.as_strided(self.shape, self.strides).contiguous()

    def read(self) -> Tensor:
        """The tensor, on the CPU, in memory of its own."""
        return self.view(self.read_bytes())


def open_size(file: Path) -> int:
    """Bytes of a weight file.

    Raises:
        InputError: it is not there, or no file.
    """
    try:
        if not file.is_file():
            raise InputError(f"{file} is missing: download the checkpoint again")
        return os.stat(file).st_size
    except OSError as error:
        raise InputError(f"{file} can't be read ({error.strerror}): expected a readable file") from None
