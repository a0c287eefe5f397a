"""`jindo-core data split`: flags and config file -> SplitConfig -> the refinery."""

from __future__ import annotations

from jindo_core.cli.flags import parse_flags
from jindo_core.data_config import SplitConfig

_DESCRIPTION = """\
Split a file of instruction data: train and test, with its ending, each row in one of them as it was.
Rows of any columns are split: no format is asked of them."""

_EPILOG = """\
examples:
  jindo-core data split --data_path all.jsonl --output_dir ./split
  jindo-core data split --data_path all.jsonl --output_dir ./split --test_size 2000 --seed 7"""


def run(argv: list[str]) -> int:
    """Splits as `argv` says and returns 0. Raises InputError for wrong input."""
    given = parse_flags(SplitConfig, argv, prog="jindo-core data split", description=_DESCRIPTION, epilog=_EPILOG)
    config = SplitConfig(**given)

    from jindo_core.refinery.view import run_split

    run_split(config)
    return 0
