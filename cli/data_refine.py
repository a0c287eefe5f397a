"""`jindo-core data refine`: flags and config file -> RefineConfig -> the engine."""

from __future__ import annotations

from jindo_core.cli.flags import parse_flags
from jindo_core.data_config_inspect import RefineConfig

_DESCRIPTION = """\
Let a model rewrite a text of each row, or score its answer; the base alone, or with an adapter.
--mode rewrite: the model's text replaces the old one where the model ended it itself, it is not empty and its length
is in bounds; else the old one stays and is counted.
--mode score: adds the mean cross entropy of the answer, its perplexity, and IFD (arXiv:2308.12032), the ratio of the
cross entropies with and without the prompt: near 1 and above, the prompt does not lead to the answer.
A run that was stopped goes on where it was when the same command runs again. --config FILE: all of it from YAML."""

_EPILOG = """\
examples:
  jindo-core data refine --mode score --data_path rows.jsonl --output_path scored.jsonl
  jindo-core data refine --mode rewrite --data_path rows.jsonl --output_path better.jsonl \\
      --lora_weights ./lora-korean --instruction "다음 번역을 자연스러운 한국어로 고쳐 쓰세요." --max_new_tokens 300"""


def run(argv: list[str]) -> int:
    """Refines as `argv` says and returns 0. Raises InputError for wrong input."""
    given = parse_flags(RefineConfig, argv, prog="jindo-core data refine", description=_DESCRIPTION, epilog=_EPILOG)
    config = RefineConfig(**given)

    from jindo_core.refine import run_refine

    run_refine(config)
    return 0
