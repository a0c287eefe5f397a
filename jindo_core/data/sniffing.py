"""What a file holds that is not what its name says: told by its first bytes, before a reader says something else."""

from __future__ import annotations

import codecs
from pathlib import Path

from jindo_core.errors import InputError

_HEAD = 4096
_TABLES = ("csv", "tsv")


def require_kind(path: Path, kind: str) -> None:
    """Refuse a file, not compressed by its name, that holds another kind than its name says.

    Args:
        kind: "json", "jsonl", "csv", …
    Raises:
        InputError: what it is, and what to do. OSError: it can't be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    found, advice = "", ""
    if head.startswith(b"\x1f\x8b"):
        found, advice = "a file that gzip compressed", "add .gz to its name" if kind != "parquet" else "gunzip it"
    elif head.startswith(b"PK\x03\x04"):
        found, advice = "a zip archive, as .xlsx is one", "unpack it, or save a sheet as CSV"
    elif head.startswith(b"PAR1") and kind != "parquet":
        found, advice = "a Parquet file", "rename it to .parquet"
    elif head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in head[:2]:
        found, advice = "UTF-16", "save it as UTF-8 (iconv -f utf-16 -t utf-8)"
    elif kind in (*_TABLES, "parquet") and text.startswith((b'{"', b"[{", b"{\n", b"[\n")):
        found, advice = "JSON", "rename it to .json or .jsonl"
    elif kind not in (*_TABLES, "parquet") and _is_table(text):
        found, advice = "a table and no JSON", "rename it to .csv or .tsv"
    if found:
        raise InputError(f"{path} is {found}, which its name does not say: {advice}")


def require_delimiter(path: Path, header: list[str], delimiter: str) -> None:
    """Refuse a table whose first line is one cell that other delimiters would cut."""
    others = {";": "';'", "\t": "tabs", ",": "commas", "|": "'|'"}
    other = next((said for mark, said in others.items() if len(header) == 1 and mark in header[0]), None)
    if other is not None:
        own, name = ("tabs", "tsv") if delimiter == "\t" else ("commas", "csv")
        rename = {"tabs": ", or rename it to .tsv", "commas": ", or rename it to .csv"}.get(other, "")
        raise InputError(f"{path}: its first line has {other} between the names, expected {own} in .{name}{rename}")


def _is_table(text: bytes) -> bool:
    line = text.split(b"\n", 1)[0]
    if any(byte < 32 and byte not in b"\t\r\f" for byte in line):
        return False  # no text
    return bool(line) and line[:1] not in b'[{"' and (b"," in line or b"\t" in line)
