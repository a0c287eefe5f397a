"""How far a run has come: all of it that is neither the model's nor the optimizer's, and goes through a checkpoint."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TextIO

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


class History:
    """The rows of metrics.jsonl, written as they come; and MMLU's scores, the first ones and those of the adapter that
    the run ends with."""

    def __init__(self, log: TextIO, tell: Callable[[Mapping[str, Any]], None] = lambda row: None) -> None:
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
        self._log.write(line + "\n")
        self._log.flush()

    def load(self, lines: Sequence[str]) -> None:
        """The rows of a run that is gone on with. All are told: who listens may have missed some, and knows which."""
        for line in lines:
            self.add_line(line)
            self._tell(json.loads(line))

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
    """

    history: History
    step: int = 0
    measured: int = -1
    tokens: int = 0
    seconds: float = 0.0
    before: float = math.nan
    first_answer: str = ""
    best: Best | None = None
    skipped: Skipped = field(default_factory=Skipped)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def packed(self) -> dict[str, Any]:
        """As JSON takes it."""
        best = self.best
        return {
            "step": self.step, "measured": self.measured, "tokens": self.tokens, "seconds": self.seconds,
            "first_answer": self.first_answer, "skipped": vars(self.skipped),
            "best": None if best is None else [best.step, best.loss, _packed(best.scores)],
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
        self.skipped = Skipped(**packed["skipped"])
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
