"""The CPU kernels in plain C (csrc/): found beside this file, loaded with ctypes.

They are built when the package is installed and a C compiler is there; without them the PyTorch references
serve, which is said once. All use torch's own OpenMP runtime: a second one would mean two pools of threads
that spin against each other, and `torch.set_num_threads` holds for these kernels too.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.machinery
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LEVELS = ("portable", "avx2", "avx512")
"""Instruction sets, lowest first; the best that the processor has is used."""

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What the C side calls the element types that it takes."""

POINTER, LONG, INT, FLOAT, DOUBLE = (
    ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_double,
)  # fmt: skip


INTERFACE = 1
"""Of the functions' arguments, csrc/level.c's jindo_interface: a library built from other sources would be handed the
wrong ones, and end the process."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None where it was not built."""
    folder = Path(__file__).parent
    built = [folder / f"_native{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    found = next((path for path in built if path.exists()), None)
    if found is None:
        warnings.warn(
            "The C kernels were not built (no C compiler when jindo-core was installed): slower PyTorch code "
            "runs on the CPU. With a compiler, install it again.",
            stacklevel=2,
        )
        return None
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    bundled += sorted((Path(torch.__file__).parent.parent / "torch.libs").glob("libgomp*"))
    try:
        ctypes.CDLL(str(bundled[0]) if bundled else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
        loaded = ctypes.CDLL(str(found))
    except OSError as error:
        warnings.warn(f"The C kernels can't be loaded ({error}): slower PyTorch code runs on the CPU.", stacklevel=2)
        return None
    if getattr(loaded, "jindo_interface", int)() != INTERFACE:
        warnings.warn(
            "The C kernels were built from other sources than these: slower PyTorch code runs on the CPU. Install "
            "jindo-core again (pip install -e .).",
            stacklevel=2,
        )
        return None
    return loaded


def function(name: str, *types: Any, returns: Any = None) -> Any:
    """The C function `name`, taking `types`."""
    loaded = library()
    assert loaded is not None, "dispatch chooses a C kernel only where the library is"
    entry = getattr(loaded, name)
    entry.argtypes, entry.restype = types, returns
    return entry


def address(tensor: Tensor | None) -> int | None:
    """The address of a tensor's first element; None, a null pointer in C, for None."""
    return None if tensor is None else tensor.data_ptr()


@contextlib.contextmanager
def level(name: str) -> Iterator[str]:
    """Use at most the instruction set `name` (one of `LEVELS`), for tests; yields the one in use."""
    choose = function("jindo_set_level", INT, returns=INT)
    try:
        yield LEVELS[choose(LEVELS.index(name))]
    finally:
        choose(len(LEVELS))
