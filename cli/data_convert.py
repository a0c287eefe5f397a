"""`jindo-core data convert`: flags and config file -> DataConvertConfig -> the engine."""

from __future__ import annotations

from jindo_core.cli.flags import parse_flags
from jindo_core.data_config_inspect import DataConvertConfig

_DESCRIPTION = """\
Write a data set in another format, and as another kind of file where the name's ending says so. Rows in are rows
out and rejected, and rows made where conversations are split; the file is written whole or not at all."""

_EPILOG = """\
examples:
  jindo-core data convert --data_path alpaca.json --output_path chats.jsonl --to sharegpt
  jindo-core data convert --data_path chats.json --output_path rows.parquet --to alpaca --rounds split"""


def run(argv: list[str]) -> int:
    """Converts as `argv` says and returns 0. Raises InputError for wrong input."""
    given = parse_flags(
        DataConvertConfig, argv, prog="jindo-core data convert", description=_DESCRIPTION, epilog=_EPILOG
    )
    config = DataConvertConfig(**given)

    from jindo_core.refinery.reformat import run_convert

    run_convert(config)
    return 0
