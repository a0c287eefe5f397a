"""`jindo-core eval`: flags and config file -> EvalConfig -> the engine."""

from __future__ import annotations

from jindo_core.cli.flags import parse_flags
from jindo_core.eval_config import EvalConfig

_DESCRIPTION = """\
Measure a model, and its LoRA adapter if one is named: perplexity of a text file, MMLU, KoBEST.
--quantize both measures it in NF4 and as it is, and says how far the two are apart.
With --output_path a run that was stopped goes on where it was, when the same command is given again."""

_EPILOG = """\
examples:
  jindo-core eval --tasks perplexity --data_path book.txt
  jindo-core eval --lora_weights ./lora-korean --tasks kobest --data_path ./kobest --output_path results.json
  jindo-core eval --base_model ./llama --tasks perplexity,kobest_copa --data_path book.txt ./kobest --quantize both"""


def run(argv: list[str]) -> int:
    """Measures as `argv` says and returns 0. Raises InputError for wrong input."""
    given = parse_flags(EvalConfig, argv, prog="jindo-core eval", description=_DESCRIPTION, epilog=_EPILOG)
    config = EvalConfig(**given)

    from jindo_core.evaluation import run_eval

    run_eval(config)
    return 0
