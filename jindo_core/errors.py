"""The one exception that means "the input is wrong": one line saying what was got, expected, and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from jindo_core.kernels.crossovers import CrossoverError as CrossoverError  # the kernels', for the command line


class InputError(ValueError):
    """Bad input from a person: a path, a file, a flag or a setting.

    The message is one line: what was got, what was expected, the fix. The command line prints it without a
    traceback and exits with code 2.
    """


def nearest(word: str, candidates: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the candidate closest in spelling to `word`, or `""` when none is close."""
    found = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return f" Did you mean '{found[0]}'?" if found else ""


class Stopped(Exception):
    """A run ended before its time, and its work is saved, as the message says. code: the process's exit code: 128 +
    signal, or 75 where the host ran out of memory."""

    def __init__(self, said: str, code: int) -> None:
        super().__init__(said)
        self.code = code


class TrainingError(RuntimeError):
    """A run that can't go on, through no fault of its input's form: the loss is not finite, say. Exit code 1."""
