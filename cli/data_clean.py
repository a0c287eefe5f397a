"""`jindo-core data clean`: flags and config file -> CleanConfig -> the refinery."""

from __future__ import annotations

from jindo_core.cli.flags import parse_flags
from jindo_core.data_config import CleanConfig

_DESCRIPTION = """\
Clean a file of instruction data by a recipe: named steps, each with its own counts. Every row is in the output or
among the rejected ones. --list_steps lists the steps; docs/refinery.md says how a recipe is written."""

_EPILOG = """\
examples:
  jindo-core data clean --data_path raw.json --dry_run
  jindo-core data clean --data_path raw.json --output_path clean.jsonl --rejected_path rejected.jsonl
  jindo-core data clean --data_path raw.json --output_path clean.jsonl --recipe my.yaml"""


def run(argv: list[str]) -> int:
    """Cleans as `argv` says and returns 0. Raises InputError for wrong input."""
    given = parse_flags(CleanConfig, argv, prog="jindo-core data clean", description=_DESCRIPTION, epilog=_EPILOG)
    config = CleanConfig(**given)

    from jindo_core.refinery.view import run_clean

    run_clean(config)
    return 0
