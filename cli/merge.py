"""`jindo-core merge`: flags and config file -> MergeConfig -> the engine."""

from __future__ import annotations

from jindo_core.cli.flags import parse_flags
from jindo_core.convert_config import MergeConfig, check_free

_DESCRIPTION = """\
Add a LoRA adapter to its base model's weights, in the base's own dtype, a tensor at a time.
--onto original: for serving in 16 bits; the weights lose nothing, but are not those the adapter was trained on.
--onto nf4: the weights that the adapter saw, written out in 16 bits: closest to training, with NF4's loss in them.
The table at the end says what each costs on held-out text."""

_EPILOG = """\
examples:
  jindo-core merge --lora_weights ./lora-korean --output_dir ./merged --onto original
  jindo-core merge --lora_weights ./lora-alpaca --output_dir ./merged --onto nf4 --eval_text book.txt"""


def run(argv: list[str]) -> int:
    """Converts as `argv` says and returns 0. Raises InputError for wrong input."""
    given = parse_flags(MergeConfig, argv, prog="jindo-core merge", description=_DESCRIPTION, epilog=_EPILOG)
    config = MergeConfig(**given)
    check_free(config.output_dir, config.overwrite)

    from jindo_core.convert import run_merge

    run_merge(config)
    return 0
