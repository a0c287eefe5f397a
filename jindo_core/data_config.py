"""Every setting of `jindo-core data clean` and `data split`, as `config` has those of `train`."""

from __future__ import annotations

from dataclasses import dataclass
from glob import glob
from pathlib import Path

from jindo_core.config import read_fields
from jindo_core.errors import InputError
from jindo_core.settings import Config, setting, settings

_FILES, _HOW, _REPORT = "files", "how", "report"
DATA_HELP = "file (.json .jsonl .csv .tsv .parquet), folder of them or Hub id"
FORMAT_HELP = "format of the rows; left out: by their columns"


@dataclass(frozen=True, kw_only=True)
class CleanConfig:
    """The settings of `jindo-core data clean`. Raises InputError when a value is wrong."""

    data_path: str | None = setting(None, _FILES, DATA_HELP, path=True, metavar="DATA")
    output_path: str | None = setting(None, _FILES, "file to write, of any of these endings", path=True, metavar="FILE")
    rejected_path: str | None = setting(
        None, _FILES, "file for the rows that were rejected, with step and reason (.jsonl)", path=True, metavar="FILE"
    )
    flagged_path: str | None = setting(None, _FILES, "the same for those that were flagged", path=True, metavar="FILE")
    overwrite: bool = setting(False, _FILES, "replace what is there, once the new one is complete")
    recipe: str = setting("default", _HOW, "default, korean or a .yaml file", metavar="RECIPE")
    dataset_format: str | None = setting(None, _HOW, FORMAT_HELP, metavar="FORMAT")
    dry_run: bool = setting(False, _HOW, "count only; no rows are written")
    list_steps: bool = setting(False, _HOW, "list the steps with their options, and end")
    seed: int = setting(42, _HOW, "for steps with an option seed, where the recipe gives it no value", at_least=0)
    workers: int = setting(0, _HOW, "processes; 0: one a core, none for a small file", at_least=0)
    report_path: str | None = setting(None, _REPORT, "file for the counts as JSON", path=True, metavar="FILE")
    json: bool = setting(False, _REPORT, "print the counts as JSON instead of a table")

    def __post_init__(self) -> None:
        read_fields(self)
        if self.list_steps:
            return
        _need(self, "data_path")
        if not self.dry_run:
            _need(self, "output_path")
        named = {name: getattr(self, f"{name}_path") for name in ("data", "output", "rejected", "flagged", "report")}
        check_apart({f"--{name}_path": path for name, path in named.items() if path is not None})


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """The settings of `jindo-core data split`. Raises InputError when a value is wrong."""

    data_path: str | None = setting(None, _FILES, DATA_HELP, path=True, metavar="DATA")
    output_dir: str | None = setting(None, _FILES, "folder for train and test files", path=True, metavar="DIR")
    overwrite: bool = setting(False, _FILES, "replace those that are there, once the new ones are complete")
    test_size: float = setting(0.1, _HOW, "rows of the test file: 2000, or 0.1 of all", above=0)
    seed: int = setting(42, _HOW, "which rows", at_least=0)
    json: bool = setting(False, _REPORT, "print the counts as JSON")

    def __post_init__(self) -> None:
        read_fields(self)
        _need(self, "data_path")
        _need(self, "output_dir")
        if self.test_size >= 1 and self.test_size != int(self.test_size):
            raise InputError(f"--test_size: got {self.test_size:g}, expected a number of rows, or a share below 1")


def _need(config: Config, name: str) -> None:
    if getattr(config, name) is None:
        raise InputError(f"--{name}: got nothing, expected {settings(type(config))[name].help}")


def check_apart(paths: dict[str, str]) -> None:
    """Every file another: a file can't be read and written at once. `paths` by flag, --data_path among them."""
    seen: dict[Path, str] = {}
    given = Path(paths["--data_path"]).expanduser()
    sources = {given.resolve(), *(Path(found).resolve() for found in glob(str(given)))}
    for flag, path in paths.items():
        place = Path(path).expanduser().resolve()
        if place in seen:
            raise InputError(f"{flag}: got {path}, which is {seen[place]} too: expected another file")
        if flag != "--data_path" and sources & {place, *place.parents}:
            raise InputError(f"{flag}: got {path}, which lies in --data_path {given}: expected a place outside it")
        seen[place] = flag
