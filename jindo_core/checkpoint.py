"""Folders of a run's state, checkpoint-STEP, of which each is whole or passed over.

A checkpoint is written into a folder with a hidden name of its own; its files and the folder are brought to the disk,
read back from there and compared; then comes manifest.json with a checksum of every file, and only then the name. So
one that has its name is complete, unless a disk spoils it later, which the checksums show. Whatever kills the writer
leaves the older ones as they were.

manifest.json: {"manifest": {"format", "id", "sequence", "step", "files": {name: {"bytes", "crc32"}}}, "crc32": of the
first object's canonical JSON}. id: drawn anew for every checkpoint, never used again. sequence: a later one has a
larger number, also where a run went back to an earlier step. CRC-32 guards against disks and copies, not people.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import tempfile
import zlib
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jindo_core.errors import InputError
from jindo_core.files import exchange, read_json, sync_folder, sync_names, write_atomically
from jindo_core.formats.safetensors_writer import verify_safetensors

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_HIDDEN = ".checkpoint-"
_SLACK = 1 << 20
"""Bytes beside the tensors and the other files: headers, the manifest, a file system's own."""

Written = Mapping[str, tuple[Path, str]]
"""{tensor's name: (its file, its checksum)}, as SafetensorsWriter has it."""


@dataclass(frozen=True)
class Checkpoint:
    """One that was seen to be whole.

    Attributes:
        files: their names. state: what state.json holds.
    """

    folder: Path
    step: int
    sequence: int
    id: str
    files: frozenset[str]
    state: dict[str, Any]


# --- writing --------------------------------------------------------------------------------------------


def write(
    output_dir: Path, step: int, small: Mapping[str, bytes], fill: Callable[[Path], Written], *, tensor_bytes: int
) -> Path:
    """Write checkpoint-STEP into `output_dir`; one of that name gives way to it in one step.

    Args:
        small: files by name, STATE among them. fill: writes the files of tensors into a folder.
        tensor_bytes: that `fill` will write.
    Raises:
        OSError, InputError: no room for it, or the disk fails; all is as it was.
    """
    needs, free = tensor_bytes + sum(map(len, small.values())) + _SLACK, shutil.disk_usage(output_dir).free
    if free < needs:
        raise InputError(f"it needs {needs / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free there")
    target = output_dir / f"checkpoint-{step}"
    if target.exists() and not is_ours(target):
        raise InputError(f"{target} is there, and another tool's: give another --output_dir")
    stage = Path(tempfile.mkdtemp(prefix=f"{_HIDDEN}{step}.", dir=output_dir))
    try:
        umask = os.umask(0)
        os.umask(umask)
        stage.chmod(0o777 & ~umask)  # mkdtemp's 0700 would hide it from its user's group
        written = fill(stage)
        for name, content in small.items():
            (stage / name).write_bytes(content)
        sync_folder(stage)
        verify_safetensors(written)
        if any((stage / name).read_bytes() != content for name, content in small.items()):
            raise InputError("a file read back differs from what was written: the disk is faulty")
        write_atomically(stage / MANIFEST, _manifest(stage, step, _last_sequence(output_dir) + 1))
        exchange(stage, target)
        sync_names(output_dir)
    finally:
        if stage.exists():  # half-written, or what had the name before
            shutil.rmtree(stage)
    return target


def _manifest(stage: Path, step: int, sequence: int) -> bytes:
    files = {path.name: _measured(path) for path in sorted(stage.iterdir())}
    return _sealed({"format": FORMAT, "id": secrets.token_hex(8), "sequence": sequence, "step": step, "files": files})


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    inner = json.dumps(manifest, sort_keys=True)
    return (json.dumps({"manifest": manifest, "crc32": _hex(zlib.crc32(inner.encode()))}, indent=1) + "\n").encode()


def _measured(path: Path) -> dict[str, Any]:
    check, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(4 << 20):
            check, size = zlib.crc32(block, check), size + len(block)
    return {"bytes": size, "crc32": _hex(check)}


def _hex(check: int) -> str:
    return f"{check:08x}"


def rotate(output_dir: Path, limit: int, spared: Container[int] = ()) -> list[Path]:
    """Remove the oldest of the valid checkpoints until `limit` are left; returns them.

    Args:
        spared: steps whose checkpoint stays, and is not counted.
    """
    valid = [(sequence, path) for path, sequence in _sequences(output_dir) if step_of(path) not in spared]
    old = [path for _, path in sorted(valid)[:-limit]]
    for path in old:
        remove(path)
    return old


def remove(folder: Path) -> None:
    """Take a checkpoint's name away first, so that a kill leaves no half of it under its name."""
    hidden = Path(tempfile.mkdtemp(prefix=f"{_HIDDEN}gone.", dir=folder.parent))
    os.rename(folder, hidden / folder.name)
    sync_names(folder.parent)
    shutil.rmtree(hidden)


def clear(output_dir: Path) -> None:
    """Remove what killed runs left half-written or half-removed. The folder must be `files.held`."""
    for path in output_dir.glob(f"{_HIDDEN}*"):
        shutil.rmtree(path)


# --- reading --------------------------------------------------------------------------------------------


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint's name; None where it is no such name."""
    found = _NAME.fullmatch(folder.name)
    return None if found is None else int(found[1])


def folders(output_dir: Path) -> list[Path]:
    """All that have a checkpoint's name, ours, others' and damaged ones, by step."""
    if not output_dir.is_dir():
        return []
    found = [(step, path) for path in output_dir.iterdir() if (step := step_of(path)) is not None and path.is_dir()]
    return [path for _, path in sorted(found)]


def is_ours(folder: Path) -> bool:
    """Whether it is a checkpoint of this package's, whole or not."""
    return (folder / MANIFEST).exists() or (folder / STATE).exists()


def read(folder: Path) -> Checkpoint:
    """A checkpoint, with every byte of it looked at.

    Raises:
        InputError: it is damaged or incomplete; says where.
    """
    manifest = _read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        try:
            found = _measured(path)
        except FileNotFoundError:
            raise InputError(f"{path} is missing, which its manifest names: the checkpoint is incomplete") from None
        except OSError as error:
            raise InputError(f"{path} can't be read ({error.strerror}): expected a checkpoint's file") from None
        if found["bytes"] != expected["bytes"]:
            raise InputError(f"{path} has {found['bytes']} bytes, written were {expected['bytes']}: it is damaged")
        if found != expected:
            raise InputError(f"{path} has another checksum than it was written with: it is damaged")
    if STATE not in manifest["files"]:
        raise InputError(f"{folder} has no {STATE} in its manifest: it is no checkpoint of a run")
    files, state = frozenset(manifest["files"]), read_json(folder / STATE)
    return Checkpoint(folder, manifest["step"], manifest["sequence"], manifest["id"], files, state)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if folder.is_dir() and not path.exists():
        raise InputError(f"{folder} has no {MANIFEST}: it is incomplete, or another tool's")
    sealed = read_json(path)
    manifest = sealed.get("manifest")
    if not isinstance(manifest, dict) or _sealed(manifest) != path.read_bytes():
        raise InputError(f"{path} has another checksum than it was written with: it is damaged")
    if manifest["format"] != FORMAT:
        raise InputError(f"{path} is of format {manifest['format']}, expected {FORMAT}: update jindo-core")
    return manifest


def newest(output_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The valid checkpoint that was written last, and what is wrong with those that were passed over."""
    faults: list[str] = []
    ranked: list[tuple[int, Path]] = []
    for path in folders(output_dir):
        if not is_ours(path):
            continue
        try:
            ranked.append((_read_manifest(path)["sequence"], path))
        except InputError as error:
            faults.append(str(error))
    for _, path in sorted(ranked, reverse=True):
        try:
            return read(path), faults
        except InputError as error:
            faults.append(str(error))
    return None, faults


def _sequences(output_dir: Path) -> Iterator[tuple[Path, int]]:
    """Those whose manifest can be read, and their place in time."""
    for path in folders(output_dir):
        try:
            yield path, _read_manifest(path)["sequence"]
        except InputError:  # damaged, or another tool's: `newest` names it where somebody wants to go on from it
            continue


def _last_sequence(output_dir: Path) -> int:
    return max((sequence for _, sequence in _sequences(output_dir)), default=0)
