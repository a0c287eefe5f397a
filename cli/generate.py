"""`jindo-core generate`: flags, config file and standard input -> GenerateConfig -> the generator."""

from __future__ import annotations

import dataclasses
import os
import sys

from jindo_core.cli.flags import parse_flags
from jindo_core.config import GenerateConfig, resolve_generate_config
from jindo_core.errors import InputError

_DESCRIPTION = """\
Answer one instruction with a model and, if named, its LoRA adapter.
Switches take --x, --x False or --no_x. In a flag's name - and _ are the same."""

_EPILOG = """\
examples:
  jindo-core generate --lora_weights ./lora-korean --instruction '봄에 대해 한 문장으로 써 줘.'
  jindo-core generate --base_model ./my-llama < question.txt
  jindo-core generate --lora_weights ./lora-7b --offload_layers 16 --offload_head   # on a GPU that is too small"""


def run(argv: list[str]) -> int:
    """Answers as `argv` says and returns 0. Raises InputError for wrong input."""
    given = parse_flags(
        GenerateConfig, argv, prog="jindo-core generate", description=_DESCRIPTION, epilog=_EPILOG
    )
    if "base_model" not in given and os.environ.get("BASE_MODEL"):
        given["base_model"] = os.environ["BASE_MODEL"]  # as alpaca-lora's generate.py does
    config = resolve_generate_config(given)
    if config.instruction is None:
        config = dataclasses.replace(config, instruction=_read_instruction())

    from jindo_core.generation import run_generate

    run_generate(config)
    return 0


def _read_instruction() -> str:
    """The instruction from standard input: UTF-8, without the last line's end, not blank."""
    if sys.stdin is None:
        raise InputError("standard input is closed: pass --instruction TEXT or pipe one in")
    if sys.stdin.isatty():
        print("Type the instruction, then Ctrl-D:", file=sys.stderr, flush=True)
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig").strip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"standard input: got a byte at offset {error.start} that is no UTF-8, expected UTF-8 text: "
            "convert it first"
        ) from error
    if not text.strip():
        raise InputError(
            "standard input: got nothing, expected an instruction: pass --instruction TEXT or pipe one in"
        )
    return text
