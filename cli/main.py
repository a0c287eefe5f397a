"""`jindo-core <command>`: finds the command, and turns what goes wrong into one line and an exit code.

Exit codes: 0 done; 2 wrong input and 1 a run that could not go on (both one line `error: ...` on standard
error); 130 stopped by Ctrl-C, 143 by SIGTERM and 75 for want of memory on the host (`train` saves a checkpoint
first); 141 the reader of the output has gone (`train` goes on without). Anything else that is raised is a defect
and keeps its traceback.
Commands are imported when they run, and the engine when its flags have been read: `--help` and a mistyped flag never
wait for torch.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable

from jindo_core import __version__
from jindo_core.errors import CrossoverError, InputError, Stopped, TrainingError, nearest

HELP = """\
jindo-core: fine-tune a LLaMA in 4 bits on a small GPU, or on none, and use the result.

commands:
  train       fine-tune on instructions; without flags: SmolLM2-135M on bundled Korean rows
  generate    answer an instruction with a model and its adapter
  eval        measure a model: perplexity, MMLU, KoBEST, and what 4 bits cost
  quantize    write a model in 4 bits, for us or for transformers
  merge       add an adapter to its base model's weights, and say what that costs
  export      write a model for Hugging Face, Meta's code or llama.cpp
  data        inspect, convert, clean and split instruction data
  plan        what a training step will take in memory, and what makes it fit
  doctor      what is there, and whether this machine can train
  tune        measure on this machine where one kernel beats another

  jindo-core <command> --help   the flags of a command
  jindo-core --version          the version

start with:  jindo-core train
"""


def _train(argv: list[str]) -> int:
    from jindo_core.cli import train

    return train.run(argv)


def _generate(argv: list[str]) -> int:
    from jindo_core.cli import generate

    return generate.run(argv)


def _eval(argv: list[str]) -> int:
    from jindo_core.cli import eval

    return eval.run(argv)


def _quantize(argv: list[str]) -> int:
    from jindo_core.cli import quantize

    return quantize.run(argv)


def _merge(argv: list[str]) -> int:
    from jindo_core.cli import merge

    return merge.run(argv)


def _export(argv: list[str]) -> int:
    from jindo_core.cli import export

    return export.run(argv)


def _data(argv: list[str]) -> int:
    from jindo_core.cli import data

    return data.run(argv)


def _plan(argv: list[str]) -> int:
    from jindo_core.cli import plan

    return plan.run(argv)


def _doctor(argv: list[str]) -> int:
    from jindo_core.cli import doctor

    return doctor.run(argv)


def _tune(argv: list[str]) -> int:
    from jindo_core.cli import tune

    return tune.run(argv)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train, "generate": _generate, "eval": _eval, "quantize": _quantize, "merge": _merge, "export": _export,
    "data": _data, "plan": _plan, "doctor": _doctor, "tune": _tune,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs one command line (`sys.argv` when None) and returns the exit code."""
    if sys.stdout is None:  # closed by who started this (`>&-`)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            # A letter that the terminal's encoding lacks becomes a ?, not a traceback.
            stream.reconfigure(errors="replace")
    try:
        code = _dispatch(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()
        return code
    except (InputError, CrossoverError) as error:
        return _fail(error, 2)
    except TrainingError as error:
        return _fail(error, 1)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has gone. Python flushes once more at exit: give it somewhere to write to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except SystemExit as stop:
        if stop.code not in (0, None):
            raise
        return 0  # --help


def _fail(error: Exception, code: int) -> int:
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return code


def _dispatch(argv: list[str]) -> int:
    if argv and argv[0] == "help":
        argv = [*argv[1:2], "--help"]
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(HELP)
        return 0
    name, rest = argv[0], argv[1:]
    if name in ("-V", "--version"):
        print(f"jindo-core {__version__}")
        return 0
    if name in COMMANDS:
        return COMMANDS[name](rest)
    expected = f"expected a command ({' or '.join(COMMANDS)})"
    if name.startswith("-"):
        raise InputError(f"got the flag {name!r} first, {expected} before its flags")
    raise InputError(f"got {name!r}, {expected}.{nearest(name, COMMANDS)} See jindo-core --help")


if __name__ == "__main__":
    sys.exit(main())
