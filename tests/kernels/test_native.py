"""The loader of the C kernels, with and without them."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys

import pytest
import torch

from jindo_core.kernels import dispatch, native


def test_the_kernels_are_built_and_a_level_can_be_chosen():
    assert native.library() is not None, "no C compiler when the package was installed?"
    with native.level("portable") as used:
        assert used == "portable"
    with native.level("avx512") as used:
        assert used in native.LEVELS


def test_torch_s_own_openmp_runtime_serves_them():
    """One runtime in the process: a second one's threads would spin against torch's."""
    code = (
        "import torch; from jindo_core.kernels import native; native.library();"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(found) == 1


def test_without_the_library_the_reference_runs_and_says_so(monkeypatch):
    monkeypatch.setattr(native.importlib.machinery, "EXTENSION_SUFFIXES", [".nowhere"])
    native.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="were not built"):
            assert native.library() is None
        assert dispatch.choose("nf4_quantize", torch.zeros(1)) == "reference"
    finally:
        monkeypatch.undo()
        native.library.cache_clear()
        assert native.library() is not None


def test_a_library_of_other_sources_is_not_used(monkeypatch):
    monkeypatch.setattr(native, "INTERFACE", -1)
    native.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="built from other sources than these"):
            assert native.library() is None
    finally:
        monkeypatch.undo()
        native.library.cache_clear()
        assert native.library() is not None


def test_the_interface_s_number_goes_with_its_functions(repo_root):
    """Of all exported functions and the structs they take: where this changes, INTERFACE changes, here and in C."""
    text = "".join(path.read_text() for path in sorted((repo_root / "kernels" / "csrc").glob("*.[ch]")))
    functions = re.findall(r"^EXPORT [^;{]*\)", text, re.MULTILINE)
    structs = re.findall(r"^typedef struct.*?^} \w+;", text, re.MULTILINE | re.DOTALL)
    assert len(functions) > 15
    digest = hashlib.sha256(re.sub(r"\s+", " ", "".join([*functions, *structs])).encode()).hexdigest()[:12]
    assert (native.INTERFACE, digest) == (1, "66979d6a5387")


def test_a_library_that_cannot_be_loaded_is_named(monkeypatch, tmp_path):
    def refuse(*_args, **_keywords):
        raise OSError("wrong ELF class")

    monkeypatch.setattr(native.ctypes, "CDLL", refuse)
    native.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="wrong ELF class"):
            assert native.library() is None
    finally:
        monkeypatch.undo()
        native.library.cache_clear()
        assert native.library() is not None
