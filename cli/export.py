"""`jindo-core export`: flags and config file -> ExportConfig -> the engine."""

from __future__ import annotations

from jindo_core.cli.flags import parse_flags
from jindo_core.convert_config import ExportConfig, check_free

_DESCRIPTION = """\
Write a model, with an adapter merged if one is named, for other programs: Hugging Face's sharded safetensors,
Meta's consolidated.00.pth, or GGUF for llama.cpp."""

_EPILOG = """\
examples:
  jindo-core export --base_model ./my-llama --format gguf --output_file my-llama.gguf --dtype q8_0
  jindo-core export --lora_weights ./lora-korean --onto original --format safetensors --output_dir ./out
  jindo-core export --base_model ./my-llama --format meta --output_dir ./consolidated"""


def run(argv: list[str]) -> int:
    """Converts as `argv` says and returns 0. Raises InputError for wrong input."""
    given = parse_flags(ExportConfig, argv, prog="jindo-core export", description=_DESCRIPTION, epilog=_EPILOG)
    config = ExportConfig(**given)
    check_free(config.output_file or config.output_dir, config.overwrite)

    from jindo_core.convert import run_export

    run_export(config)
    return 0
