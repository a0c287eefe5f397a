"""`jindo-core data inspect`: flags and config file -> InspectConfig -> the engine."""

from __future__ import annotations

from jindo_core.cli.flags import parse_flags
from jindo_core.data_config_inspect import InspectConfig

_DESCRIPTION = """\
Say what a data set holds: rows, format, lengths, languages, what its text costs in tokens, duplicates, and the dirt
that `data clean` would find. Nothing is changed. Languages, tokens, near duplicates and dirt are those of a seeded
sample; the rest is counted over all rows, twice through the files, in bounded memory."""

_EPILOG = """\
examples:
  jindo-core data inspect --data_path rows.jsonl
  jindo-core data inspect --data_path ./rows --base_model smollm2-135m-instruct --output_dir ./report"""


def run(argv: list[str]) -> int:
    """Prints what is found and returns 0. Raises InputError for wrong input."""
    given = parse_flags(InspectConfig, argv, prog="jindo-core data inspect", description=_DESCRIPTION, epilog=_EPILOG)
    config = InspectConfig(**given)

    from jindo_core.refinery.inspect_report import run_inspect

    run_inspect(config)
    return 0
