"""A recipe: which steps run, in which order, with which options; a YAML file or one of the package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jindo_core.errors import InputError, nearest
from jindo_core.refinery import (
    conversation_steps,
    duplicate_steps,
    korean_steps,
    personal,
    text_steps,
    translation_steps,
)
from jindo_core.refinery.pipeline import RawStep, Step
from jindo_core.settings import settings

STEPS: dict[str, type[Step]] = {
    step.name: step
    for module in (text_steps, conversation_steps, translation_steps, korean_steps, duplicate_steps, personal)
    for step in module.STEPS
}  # fmt: skip

_FORM = "expected lines such as\nsteps:\n  - nfc\n  - html: {tags: strip}"


@dataclass(frozen=True)
class Recipe:
    """Steps in the order in which they run; a step may stand there twice.

    Attributes:
        labels: the steps' names, `nfc (2)` for a second one.
    """

    name: str
    steps: tuple[Step, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        names = [step.name for step in self.steps]
        return tuple(
            name if (before := names[:place].count(name)) == 0 else f"{name} ({before + 1})"
            for place, name in enumerate(names)
        )


def step_help(step: type[Step]) -> str:
    """What a step does, in a line."""
    return str(step.__doc__).partition("\n")[0]


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = files("jindo_core.refinery") / "recipes"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_path: str | Path, seed: int = 42) -> Recipe:
    """A recipe of the package by name, or the user's own from a .yaml or .yml file.

    Args:
        seed: for steps with an option `seed` to which the recipe gives no value.
    Raises:
        InputError: no such name or file, no YAML, an unknown step or option (with the nearest name), a wrong value, or
            a step that must stand before others and doesn't.
    """
    text = str(name_or_path)
    if text in recipe_names():
        path = Path(str(files("jindo_core.refinery") / "recipes" / f"{text}.yaml"))
    else:
        path = Path(text).expanduser()
        if path.suffix.lower() not in (".yaml", ".yml"):
            known = recipe_names()
            raise InputError(
                f"recipe {text!r} is unknown: expected {' or '.join(known)}, or a .yaml file.{nearest(text, known)}"
            )
    return make_recipe(path.stem, _read(path), seed, where=f"recipe {path.name}")


def make_recipe(name: str, steps: list[Any], seed: int = 42, *, where: str = "recipe") -> Recipe:
    """A recipe from its YAML list: names, and {name: {option: value}}. Raises InputError as `load_recipe`."""
    made: list[Step] = []
    for number, entry in enumerate(steps, 1):
        step = _make_step(entry, seed, f"{where}, step {number}")
        if isinstance(step, RawStep) and made and not isinstance(made[-1], RawStep):
            raise InputError(
                f"{where}, step {number} ({step.name}) stands after {made[-1].name}: it works on rows before they are "
                "read, so put it first"
            )
        made.append(step)
    if not made:
        raise InputError(f"{where} has no steps: {_FORM}")
    return Recipe(name, tuple(made))


def _make_step(entry: Any, seed: int, where: str) -> Step:
    if isinstance(entry, str):
        entry = {entry: None}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise InputError(f"{where}: got {_short(entry)}, expected a step's name, or one name with its options")
    ((name, options),) = entry.items()
    if name not in STEPS:
        raise InputError(
            f"{where}: got the unknown step {name!r}.{nearest(str(name), STEPS)} See jindo-core data clean --list_steps"
        )
    step = STEPS[name]
    known = settings(step)
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise InputError(f"{where} ({name}): got {_short(options)}, expected options such as {{option: value}}")
    values: dict[str, Any] = {"seed": seed} if "seed" in known else {}
    for option, value in options.items():
        if option not in known:
            has = f"its options are {', '.join(known)}." if known else "it has no options."
            raise InputError(f"{where} ({name}): got the unknown option {option!r}, {has}{nearest(str(option), known)}")
        values[option] = known[option].read(value, label=f"{where} ({name}): {option}")
    try:
        return step(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _short(value: object) -> str:
    said = repr(value)
    return said if len(said) <= 60 else said[:57] + "..."


def _read(path: Path) -> list[Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"recipe {path} can't be read ({error.strerror}): expected a .yaml file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"recipe {path} is no UTF-8 (byte {error.start}): save it as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        said = getattr(error, "problem", None) or "no YAML"
        raise InputError(f"recipe {path}: got broken YAML{line} ({said}), {_FORM}") from None
    if not isinstance(content, dict) or not isinstance(content.get("steps"), list):
        raise InputError(f"recipe {path} has no list `steps`: {_FORM}")
    unknown = sorted(str(key) for key in content if key not in ("steps", "description"))
    if unknown:
        raise InputError(f"recipe {path}: got the unknown key {unknown[0]!r}, expected steps, description")
    return list(content["steps"])
