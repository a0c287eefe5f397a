"""Up to how many rows a kernel for few rows beats dequantize + GEMM: one table, by kind of device.

`crossovers.json` beside this file ships with the package; `jindo-core tune` measures a machine's own rows into
the user's copy, whose rows win. Keys: "cpu", "cuda-8.0" (a compute capability), and "cuda" for any other GPU.
Standard library only: the command line names this module's error before torch is imported.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

SHIPPED = Path(__file__).with_name("crossovers.json")
LIMITS = ("gemv_max_rows", "fused_max_rows")


class CrossoverError(ValueError):
    """A table that can't be read; the message is one line that names the file and the fix."""


class Crossover(NamedTuple):
    """A row of the table.

    Attributes:
        gemv_max_rows: M up to which the kernel for few rows (C, or Triton's GEMV) is the fastest.
        fused_max_rows: M up to which dequantizing inside the matrix product is, where the result is wide enough to
            give every multiprocessor a tile; GPUs only.
        measured: by `tune` on a machine of this kind; else an estimate from instruction counts and bandwidth.
    """

    gemv_max_rows: int = 0
    fused_max_rows: int = 0
    measured: bool = False


def find(key: str) -> Crossover:
    """The row of `key`, or "cuda"'s for a GPU that has none.

    Raises:
        CrossoverError: the user's copy can't be read.
    """
    table = _table()
    return table[key] if key in table else table["cuda" if key.startswith("cuda") else "cpu"]


def user_file() -> Path:
    """The user's copy: in $JINDO_CACHE, else jindo-core in the user's cache folder, as the embedded model is."""
    if own := os.environ.get("JINDO_CACHE"):
        return Path(own) / SHIPPED.name
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jindo-core" / SHIPPED.name


def save(key: str, row: Crossover, **facts: Any) -> Path:
    """Put a row into the user's copy, keeping its others; used from then on. Returns the file.

    Args:
        facts: written beside the row for its reader: the date, the machine, the ratios.
    """
    path = user_file()
    rows = _read(path) if path.exists() else {}
    limits = LIMITS if key.startswith("cuda") else LIMITS[:1]
    rows[key] = {name: getattr(row, name) for name in limits} | {"measured": row.measured} | facts
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        os.replace(part, path)  # whole or not at all
    except OSError as error:
        raise CrossoverError(f"{path} can't be written ({error.strerror}): set JINDO_CACHE to a folder") from None
    forget()
    return path


def forget() -> None:
    """Read the files again at the next `find`."""
    _table.cache_clear()


@functools.cache
def _table() -> Mapping[str, Crossover]:
    table = {key: _row(SHIPPED, key, row) for key, row in _read(SHIPPED).items()}
    own = user_file()
    if own.exists():
        table |= {key: _row(own, key, row) for key, row in _read(own).items()}
    return table


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CrossoverError(f"{path} can't be read ({error.strerror}): delete it, or make it readable") from None
    except ValueError as error:
        raise CrossoverError(f"{path} is no JSON ({error}): delete it, or run jindo-core tune afterwards") from None
    if not isinstance(found, dict):
        raise CrossoverError(f"{path} holds a {type(found).__name__}, expected an object of rows: delete it")
    return found


def _row(path: Path, key: str, row: object) -> Crossover:
    if key != "cpu" and key.partition("-")[0] != "cuda":
        raise CrossoverError(f"{path}: got the row {key!r}, expected cpu, cuda or cuda-8.0: delete the row or the file")
    if not isinstance(row, dict) or LIMITS[0] not in row:
        raise CrossoverError(f"{path}: {key} has no {LIMITS[0]}: delete the row, or the file")
    if key != "cpu" and LIMITS[1] not in row:  # as an earlier version wrote it
        raise CrossoverError(f"{path}: {key} has no {LIMITS[1]}: delete the file and run jindo-core tune again")
    for name in LIMITS:
        value = row.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise CrossoverError(
                f"{path}: {key} has {name} {value!r}, expected a whole number of at least 0: delete the file"
            )
    return Crossover(**{name: row.get(name, 0) for name in LIMITS}, measured=row.get("measured") is True)
