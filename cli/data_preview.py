"""`jindo-core data preview`: flags and config file -> PreviewConfig -> the engine."""

from __future__ import annotations

from jindo_core.cli.flags import parse_flags
from jindo_core.data_config_inspect import PreviewConfig

_DESCRIPTION = """\
Show rows as the model will see them: decoded token by token, with what is learned in colour, lengths, and what
cutoff_len takes off."""

_EPILOG = """\
examples:
  jindo-core data preview --data_path rows.jsonl
  jindo-core data preview --data_path chats.json --base_model ./llama --prompt_template_name vicuna_v1.1 --rows 5"""


def run(argv: list[str]) -> int:
    """Prints the rows and returns 0. Raises InputError for wrong input."""
    given = parse_flags(PreviewConfig, argv, prog="jindo-core data preview", description=_DESCRIPTION, epilog=_EPILOG)
    config = PreviewConfig(**given)

    from jindo_core.refinery.preview import run_preview

    run_preview(config)
    return 0
