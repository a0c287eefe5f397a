"""`jindo-core data <command>`: finds the command, a module of its own that is imported when it runs."""

from __future__ import annotations

import importlib
import sys

from jindo_core.errors import InputError, nearest

HELP = """\
jindo-core data: look at instruction data, bring it to another format, clean it, split it.

commands:
  inspect     rows, format, languages, lengths, duplicates, dirt
  convert     to another format: alpaca, ShareGPT, messages, orca, text, …
  clean       by a recipe of named steps, each with its counts
  split       a training and a test file, by a seed
  preview     rows as the model will learn them, with their mask
  refine      let a model rewrite or score the rows

  jindo-core data <command> --help   the flags of a command

start with:  jindo-core data inspect --data_path FILE
"""
COMMANDS = ("inspect", "convert", "clean", "split", "preview", "refine")


def run(argv: list[str]) -> int:
    """Runs the command that `argv` begins with. Raises InputError for an unknown one."""
    if argv and argv[0] == "help":
        argv = [*argv[1:2], "--help"]
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(HELP)
        return 0
    name = argv[0]
    if name not in COMMANDS:
        kind = "the flag " if name.startswith("-") else ""
        raise InputError(
            f"got {kind}{name!r} after data, expected a command ({' or '.join(COMMANDS)}).{nearest(name, COMMANDS)}"
        )
    code: int = importlib.import_module(f"jindo_core.cli.data_{name}").run(argv[1:])
    return code
