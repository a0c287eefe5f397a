"""How far a run has come: all of it that is neither the model's nor the optimizer's, and goes through a checkpoint."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch

from jindo_core.data.lazy import LazySequence
from jindo_core.errors import InputError, TrainingError
from jindo_core.mmlu import Scores
from jindo_core.recompute import random_state, set_random_state

MOST_SKIPPED = 5
"""Steps in a row without a finite gradient that end a run."""

NOT_FINITE = "no adapter was saved; lower --learning_rate, use --dtype fp32, or look at the data"


class Rows(LazySequence[dict[str, Any]]):
    """Rows of metrics, kept as lines of JSON: half of a dict's memory, and a long run has many. A figure that is
    null there is NaN here, but for `epoch`."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __len__(self) -> int:
        return len(self.lines)

    def _at(self, index: int) -> dict[str, Any]:
        row = json.loads(self.lines[index])
        return {k: math.nan if v is None and k != "epoch" else v for k, v in row.items()}


class MetricsLog:
    """A context manager: the file of a run's rows, a line each, written as they come.

    A disk without room for a row ends no run. That is said once; the rows are the history's, and in every checkpoint;
    with each later one those that are missing are tried again, behind what is whole.

    Args:
        path: begun anew; None for a rank that writes none. notice: is told.
    """

    def __init__(self, path: Path | None, notice: Callable[[str], None]) -> None:
        self._path, self._notice = path, notice
        self._file = -1
        self._rows = self._size = 0  # what is whole in the file: lines, bytes
        self._failed = False

    def __enter__(self) -> MetricsLog:
        self.write([])  # the rows of a run before are gone now
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file >= 0:
            with contextlib.suppress(OSError):  # nothing is held back that could be lost; what failed was said
                os.close(self._file)
            self._file = -1

    def write(self, lines: Sequence[str]) -> None:
        """Bring the file up to `lines`, all rows so far."""
        if self._path is None:
            return
        try:
            self._append(lines)
        except OSError as error:
            if not self._failed:
                self._notice(
                    f"{self._path.name} could not be written ({error.strerror}), and the run goes on: its rows are "
                    "kept, and written when there is room"
                )
            self._failed = True
            return
        if self._failed:
            self._notice(f"{self._path.name} has all rows again")
        self._failed = False

    def complete(self, lines: Sequence[str]) -> None:
        """Bring the file up to `lines` and to the disk, after which it is closed. Raises OSError where that fails."""
        if self._path is None:
            return
        self._append(lines)
        os.fsync(self._file)
        file, self._file = self._file, -1
        os.close(file)

    def _append(self, lines: Sequence[str]) -> None:
        """Without a buffer, in which a row that failed would lie and fail again; and at a place of its own, so that
        half a row is written over."""
        assert self._path is not None
        if self._file < 0:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            self._rows = self._size = 0
        text, done = "".join(f"{line}\n" for line in lines[self._rows :]).encode(), 0
        try:
            while done < len(text):
                done += os.pwrite(self._file, text[done:], self._size + done)
        except OSError:
            with contextlib.suppress(OSError):  # of a disk that fails altogether the first error tells more
                os.ftruncate(self._file, self._size)
            raise
        self._rows, self._size = len(lines), self._size + len(text)


class History:
    """The rows of metrics.jsonl, written as they come; and MMLU's scores, the first ones and those of the adapter that
    the run ends with."""

    def __init__(self, log: MetricsLog, tell: Callable[[Mapping[str, Any]], None] = lambda row: None) -> None:
        """tell: is told of every row."""
        self.rows = Rows()
        self.first_scores: Scores | None = None
        self.last_scores: Scores | None = None
        self._log, self._tell = log, tell

    def add(self, row: dict[str, Any]) -> None:
        self.add_line(json.dumps(_plain(row)))
        self._tell(row)

    def add_line(self, line: str) -> None:
        """A row as its line of JSON, which is not told."""
        self.rows.lines.append(line)
        self._log.write(self.rows.lines)

    def load(self, lines: Sequence[str]) -> None:
        """The rows of a run that is gone on with. All are told: who listens may have missed some, and knows which."""
        for line in lines:
            self.add_line(line)
            self._tell(json.loads(line))

    def complete(self) -> None:
        """See to it that the log has all rows, on the disk. Raises OSError where that fails."""
        self._log.complete(self.rows.lines)

    def add_scores(self, step: int, scores: Scores) -> None:
        self.add({"step": step, **scores.metrics()})
        self.first_scores, self.last_scores = self.first_scores or scores, scores


def perplexity(loss: float) -> float:
    """exp of a mean cross entropy; infinite where no float holds it, NaN of NaN."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """NaN is no JSON: a figure that is not there is null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


@dataclass
class Skipped:
    """Steps whose gradient was not finite: they change nothing, and so many in a row end the run."""

    total: int = 0
    running: int = 0

    def count(self, step: int, loss: float, norm: float, rows: Callable[[], str], say: Callable[[str], None]) -> bool:
        """Whether this step is to be skipped. rows: names the step's batch."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.running = 0
            return False
        what, value = ("gradient", norm) if math.isfinite(loss) else ("loss", loss)
        self.total, self.running = self.total + 1, self.running + 1
        if self.running >= MOST_SKIPPED:
            raise TrainingError(
                f"the {what} at step {step} is {value}, and {self.running - 1} steps before it failed so: "
                f"{NOT_FINITE}, here {rows()}"
            )
        say(f"the {what} at step {step} is {value}: the step is skipped ({rows()})")
        return True


@dataclass
class Pace:
    """Some steps: how many, their tokens, and their seconds."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Best(NamedTuple):
    """The checkpoint that was measured best so far, at the step that it holds; scores: MMLU's, where it was asked."""

    step: int
    loss: float
    scores: Scores | None = None


@dataclass
class RunState:
    """What a run has done.

    Attributes:
        step: steps done. measured: the step of the last measurement, -1 before any.
        tokens, seconds: of all steps, measurements aside. before: the held-out loss before the first step.
        first_answer: to the probe, before it.
        best, candidate: the checkpoint that was measured best; and the step that was measured better, of which there is
            no checkpoint yet.
        aside: the steps that say nothing of the run's speed: those that compile, and those under the profiler.
    """

    history: History
    step: int = 0
    measured: int = -1
    tokens: int = 0
    seconds: float = 0.0
    before: float = math.nan
    first_answer: str = ""
    best: Best | None = None
    candidate: Best | None = None
    skipped: Skipped = field(default_factory=Skipped)
    aside: Pace = field(default_factory=Pace)

    def add_step(self, tokens: int, seconds: float, *, usual: bool = True) -> None:
        """Count a step. usual: it took the time that steps of this run take."""
        self.step, self.tokens, self.seconds = self.step + 1, self.tokens + tokens, self.seconds + seconds
        if not usual:
            one = self.aside
            one.steps, one.tokens, one.seconds = one.steps + 1, one.tokens + tokens, one.seconds + seconds

    @property
    def usual(self) -> Pace:
        """The steps by which the run's speed is known."""
        one = self.aside
        return Pace(self.step - one.steps, self.tokens - one.tokens, self.seconds - one.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Of the usual steps; of all where none is usual yet."""
        seen = self.usual if self.usual.steps else Pace(self.step, self.tokens, self.seconds)
        return seen.tokens / seen.seconds if seen.seconds else 0.0

    @property
    def seconds_a_step(self) -> float:
        """Of the usual steps; of all where none is usual yet."""
        seen = self.usual if self.usual.steps else Pace(self.step, self.tokens, self.seconds)
        return seen.seconds / seen.steps if seen.steps else 0.0

    def keep_candidate(self) -> None:
        """Its checkpoint is there."""
        self.best, self.candidate = self.candidate or self.best, None

    def packed(self) -> dict[str, Any]:
        """As JSON takes it, for a checkpoint: whose candidate is the best then."""
        best = self.candidate or self.best
        return {
            "step": self.step, "measured": self.measured, "tokens": self.tokens, "seconds": self.seconds,
            "first_answer": self.first_answer, "skipped": vars(self.skipped),
            "best": None if best is None else [best.step, best.loss, _packed(best.scores)], "aside": vars(self.aside),
            "first_scores": _packed(self.history.first_scores),
            "history": list(self.history.rows.lines), **_plain({"before": self.before}),
        }  # fmt: skip

    def load(self, packed: Mapping[str, Any]) -> None:
        """The inverse of `packed`; the rows are written to the log once more, and told."""
        self.step, self.measured, self.tokens = packed["step"], packed["measured"], packed["tokens"]
        self.seconds, self.first_answer = packed["seconds"], packed["first_answer"]
        self.before = math.nan if packed["before"] is None else packed["before"]
        if packed["best"] is not None:
            step, loss, *scores = packed["best"]
            self.best = Best(step, loss, _unpacked(scores[0]) if scores else None)
        self.skipped, self.aside = Skipped(**packed["skipped"]), Pace(**packed.get("aside", {}))
        self.history.first_scores = _unpacked(packed["first_scores"])
        self.history.load(packed["history"])


def _packed(scores: Scores | None) -> dict[str, Any] | None:
    return None if scores is None else dict(vars(scores))


def _unpacked(held: Mapping[str, Any] | None) -> Scores | None:
    if held is None:
        return None
    subjects = {name: (right, count) for name, (right, count) in held["subjects"].items()}
    return Scores(held["split"], tuple(held["predictions"]), subjects, held["loss"])


def random_states(device: torch.device) -> dict[str, Any]:
    """Of every generator that a run may draw from, as JSON takes it: Python's, numpy's, torch's and the device's."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": _text(torch.get_rng_state()),
        "device": device.type,
        "device_state": _text(random_state(device)),
    }


def set_random_states(states: Mapping[str, Any], device: torch.device) -> bool:
    """The inverse of `random_states`. False where the states are of another kind of device, whose own stays as it is.

    Raises:
        InputError: a state that is none.
    """
    version, numbers, gauss = states["python"]
    name, keys, *rest = states["numpy"]
    try:
        random.setstate((version, tuple(numbers), gauss))
        np.random.set_state((name, np.asarray(keys, np.uint32), *rest))
        torch.set_rng_state(_bytes(states["torch"]))
        if states["device"] == device.type:
            set_random_state(device, _bytes(states["device_state"]))
    except (ValueError, TypeError, RuntimeError) as error:
        said = f"the checkpoint's random state can't be taken up ({error}): it is another version's"
        raise InputError(said) from None
    return bool(states["device"] == device.type)


def _text(state: torch.Tensor) -> str:
    return bytes(state.cpu().numpy()).hex()


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
