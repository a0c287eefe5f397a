"""One setting of a config: its type, default, help and bounds, and how its value is read from text or a file."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from jindo_core.errors import InputError

_TRUE = frozenset({"true", "1", "yes", "on", "t", "y"})
_FALSE = frozenset({"false", "0", "no", "off", "f", "n"})

_MODULE_NAME = re.compile(r"[\w.-]+")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


@dataclass(frozen=True)
class Setting:
    """What is known of one field of a config: enough to read a value, make a flag of it and explain it.

    also: choices of other trainers, understood but not listed. kind "word": any value, for none changes anything.
    """

    name: str
    kind: Literal["int", "float", "bool", "text", "names", "paths", "numbers", "word"]
    help: str
    group: str
    default: Any
    optional: bool = False
    choices: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    metavar: str = ""
    path: bool = False
    example: str = "module names such as q_proj,v_proj"  # of "names"
    verbatim: bool = False
    empty_is_none: bool = False
    hidden: bool = False
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def expected(self) -> str:
        """What a value of this setting may be, in words: `a whole number of at least 1`."""
        if self.choices:
            return " or ".join(self.choices) if len(self.choices) < 3 else "one of " + ", ".join(self.choices)
        if self.kind == "bool":
            return "True or False"
        if self.kind == "names":
            return f"a list of {self.example}"
        if self.kind == "paths":
            return "one path or several, none blank"
        if self.kind == "numbers":
            return f"{self._bounded('a number')}, or several such as 1,0.5"
        if self.kind == "text":
            return "a path, not blank" if self.path else "text, not blank"
        return self._bounded("a whole number" if self.kind == "int" else "a number")

    def _bounded(self, what: str) -> str:
        bounds = [("of at least", self.at_least), ("above", self.above), ("at most", self.at_most)]
        said = [
            f"{word} {bound if isinstance(bound, int) else format(bound, 'g')}"
            for word, bound in [*bounds, ("below", self.below)] if bound is not None
        ]  # fmt: skip
        return " ".join([what, " and ".join(said)]).strip()

    def read(self, value: object, label: str | None = None) -> Any:
        """The value in this setting's own type, from text (a flag) or from a typed value (a file, Python).

        `label` names the value in messages; `--name` when left out. Raises InputError when the value is of
        another type, out of bounds or not among the choices.
        """
        if (value is None and self.optional) or (value == "" and self.empty_is_none):
            return None
        found = _READERS[self.kind](value)
        if found is None or not self._within(found):
            got = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
            numeric = self.kind in ("int", "float") and self.default is not None
            example = f", for example {show(self.default)}" if numeric else ""
            raise InputError(f"{label or '--' + self.name}: got {got}, expected {self.expected()}{example}")
        # The shell expands no ~ in --output_dir=~/x, and nobody does in a file.
        if self.kind == "paths":
            return tuple(os.path.expanduser(path) for path in found)
        return os.path.expanduser(str(found)) if self.path else found

    def _within(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices or value in self.also
        if self.kind not in ("int", "float", "numbers"):
            return True
        return all(self._in_bounds(number) for number in (value if self.kind == "numbers" else (value,)))

    def _in_bounds(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


def show(value: Any) -> str:
    """A setting's value as it would be typed after its flag."""
    if isinstance(value, tuple):
        return ",".join(part if isinstance(part, str) else show(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _whole(value: object) -> int | None:
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: object) -> float | None:
    # A string is read too where the value comes from YAML: PyYAML takes `1e-4` for a string.
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _boolean(value: object) -> bool | None:
    if isinstance(value, str):
        word = value.strip().lower()
        return True if word in _TRUE else False if word in _FALSE else None
    return value if isinstance(value, bool) else None


def _text(value: object) -> str | None:
    found = os.fspath(value) if isinstance(value, os.PathLike) else value
    return found if isinstance(found, str) and found.strip() else None


def _names(value: object) -> tuple[str, ...] | None:
    """`[q_proj,v_proj]`, `["q_proj", "v_proj"]`, `q_proj,v_proj`, `q_proj v_proj` or a list of strings."""
    if isinstance(value, str):
        text = value.strip()
        if text[:1] + text[-1:] in ("[]", "()"):
            text = text[1:-1]
        parts = [part.strip("'\"") for part in re.split(r"[,\s]+", text.strip()) if part]
    elif isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
        parts = list(value)
    else:
        return None
    if not parts or not all(_MODULE_NAME.fullmatch(part) for part in parts):
        return None
    return tuple(dict.fromkeys(parts))


SEPARATOR = "\0"
"""What joins several paths on their way through argparse: the one character that no path and no argument holds."""


def _paths(value: object) -> tuple[str, ...] | None:
    """A path (a comma or a space is part of it), a list of them, or several joined by `SEPARATOR`."""
    if isinstance(value, str):
        value = value.split(SEPARATOR)
    parts = [_text(part) for part in value] if isinstance(value, list | tuple) else [_text(value)]
    found = tuple(part for part in parts if part is not None)
    return found if found and len(found) == len(parts) else None


def _numbers(value: object) -> tuple[float, ...] | None:
    """`1,0.5`, `1 0.5`, `[1, 0.5]`, a number or a list of them."""
    if isinstance(value, str):
        value = [part for part in re.split(r"[,\s]+", value.strip().strip("[]()").strip()) if part]
    parts = [_number(part) for part in (value if isinstance(value, list | tuple) else [value])]
    found = tuple(part for part in parts if part is not None)
    return found if found and len(found) == len(parts) else None


def size_in_bytes(text: str) -> int | None:
    """`4GB`, `400MB` (powers of 1000), `2GiB` (of 1024) or plain bytes; None where it is none of these, or zero."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        return None
    base = 1024 if found[3] else 1000
    return int(float(found[1]) * base ** " KMGT".index(found[2].upper() or " ")) or None


_READERS: dict[str, Callable[[object], Any]] = {
    "int": _whole,
    "float": _number,
    "bool": _boolean,
    "text": _text,
    "names": _names,
    "paths": _paths,
    "numbers": _numbers,
    "word": str,
}


def setting(default: Any, group: str, help: str, **more: Any) -> Any:
    """A field of a config; `more` are the other attributes of its `Setting`."""
    return dataclasses.field(default=default, metadata={"help": help, "group": group, **more})


class Config(typing.Protocol):  # any dataclass whose fields are settings
    __dataclass_fields__: typing.ClassVar[dict[str, Any]]


def settings(config_class: type[Config]) -> dict[str, Setting]:
    """The settings of a config class by name, in the order of its fields."""
    hints = typing.get_type_hints(config_class)
    return {
        field.name: _describe(field.name, hints[field.name], field.default, dict(field.metadata))
        for field in dataclasses.fields(config_class)
    }


def _describe(name: str, hint: Any, default: Any, metadata: dict[str, Any]) -> Setting:
    # `Literal[…] | None` is a typing.Union, `str | None` is not.
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    optional = union and types.NoneType in typing.get_args(hint)
    if optional:
        (hint,) = [part for part in typing.get_args(hint) if part is not types.NoneType]
    choices: tuple[str, ...] = ()
    kind: Any
    if typing.get_origin(hint) is Literal:
        choices, kind = typing.get_args(hint), "text"
    elif typing.get_origin(hint) is tuple:
        kind = "numbers" if typing.get_args(hint)[0] is float else "paths" if metadata.get("path") else "names"
    else:
        kind = {int: "int", float: "float", bool: "bool", str: "text"}[hint]
    metadata.setdefault("metavar", "|".join(choices) or {"int": "N", "float": "X"}.get(kind, "TEXT"))
    return Setting(name=name, kind=kind, default=default, optional=optional, choices=choices, **metadata)
