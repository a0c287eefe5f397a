"""`jindo-core quantize`: flags and config file -> QuantizeConfig -> the engine."""

from __future__ import annotations

from jindo_core.cli.flags import parse_flags
from jindo_core.convert_config import QuantizeConfig, check_free

_DESCRIPTION = """\
Write a model in 4 bits (NF4): half a byte a weight, loaded by train, generate and transformers as it is.
The layers' linear weights are quantized, a tensor at a time; embedding, norms and head stay as they are."""

_EPILOG = """\
examples:
  jindo-core quantize --base_model ./my-llama --output_dir ./my-llama-nf4
  jindo-core quantize --base_model ./my-llama --output_dir ./for-transformers --format bitsandbytes"""


def run(argv: list[str]) -> int:
    """Converts as `argv` says and returns 0. Raises InputError for wrong input."""
    given = parse_flags(QuantizeConfig, argv, prog="jindo-core quantize", description=_DESCRIPTION, epilog=_EPILOG)
    config = QuantizeConfig(**given)
    check_free(config.output_dir, config.overwrite)

    from jindo_core.convert import run_quantize

    run_quantize(config)
    return 0
