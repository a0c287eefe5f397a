"""Ours and the peers', timed in turn on the same data: machines are noisy, and pairs share the noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.ceilings import Ceilings
from jindo_core.tune import timer

OURS = "jindo"
SCALE = {"GB/s": 1e9, "TFLOP/s": 1e12}


@dataclass
class Case:
    """One row to measure.

    Attributes:
        operator: whose tests must pass first (tests/kernels/test_<operator>.py), or "step".
        name: of the row. shape: of its data, for the reader.
        work: bytes moved or floating-point operations of one call; unit: what it is measured in.
        limit: the machine's ceiling that bounds it: "copy", "read" or "gemm". rows: M of that product.
        calls: name -> call, ours first; each is given the round's number, by which it rotates its inputs.
        implementation: which of our implementations runs.
        tolerance: largest difference of a peer's result from ours, relative to its largest value; None: no check.
        unlike: peers with another format, whose results need not agree.
        tokens: of one call, where tokens a second mean something.
        graph: whether a GPU's kernels are timed by replaying a CUDA graph (`timer`), so without the time that Python
            and launches take; False for whole steps, whose users wait for both, and for calls that sync.
    """

    operator: str
    name: str
    shape: str
    work: float
    unit: str
    limit: str
    calls: dict[str, Callable[[int], Any]]
    rows: int = 0
    implementation: str = ""
    tolerance: float | None = None
    unlike: frozenset[str] = frozenset()
    tokens: int = 0
    graph: bool = False
    notes: dict[str, Any] = field(default_factory=dict)


class Pair:
    """The rounds of one case. `peers()` runs and times the peers once, `ours()` ours.

    A peer that raises is left out of the row, which names it and its error: an old version, or no such device.
    Ours may raise.
    """

    def __init__(self, case: Case, device: torch.device, budget: float = 2.0) -> None:
        self.case, self.device = case, device
        self.taken: dict[str, list[float]] = {name: [] for name in case.calls}
        self.failed: dict[str, str] = {}
        self.by_events: set[str] = set()
        self._timers: dict[str, Callable[[int], float]] = {}
        self._turn = 0
        self._warm_up()
        once = sum(min(times) for times in self.taken.values() if times)
        self.rounds = min(max(int(budget / max(once, 1e-9)), 3), 30)
        self.taken = {name: [] for name in self.taken if name not in self.failed}
        self._turn = 0

    def _warm_up(self) -> None:
        """Twice: compilation and page faults. Compares results the first time."""
        for turn in range(2):
            wanted = None
            for name, call in self.case.calls.items():
                if name in self.failed:
                    continue
                if turn:
                    self._time(name)
                    continue
                try:
                    result = call(0)
                except Exception as error:  # a peer's failure is the row's finding, not its end
                    if name == OURS:
                        raise
                    self.failed[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                    continue
                if self.case.tolerance is None:
                    continue
                if name == OURS:
                    wanted = [part.clone() for part in parts(result)]
                elif name not in self.case.unlike:
                    assert wanted is not None
                    difference = max(distance(*pair) for pair in zip(parts(result), wanted, strict=True))
                    assert difference <= self.case.tolerance, (
                        f"{self.case.name}: {name} differs from ours by {difference:.3g}: not the same work"
                    )

    def _time(self, name: str) -> None:
        if name not in self._timers:
            self._timers[name] = self._timer(name)
        self.taken[name].append(self._timers[name](self._turn))

    def _timer(self, name: str) -> Callable[[int], float]:
        call = self.case.calls[name]
        if not self.case.graph or self.device.type != "cuda":
            return timer(call, self.device, graph=False)
        try:
            return timer(call, self.device)
        except RuntimeError:  # a peer that syncs; ours must not, where the case says so
            if name == OURS:
                raise
            self.by_events.add(name)
            return timer(call, self.device, graph=False)

    def peers(self) -> None:
        for name in self.taken:
            if name != OURS:
                self._time(name)

    def ours(self) -> None:
        self._time(OURS)
        self._turn += 1

    def row(self, ceilings: Ceilings) -> dict[str, Any]:
        """The row: medians, rate, share of the ceiling, ratios."""
        case = self.case
        medians = {name: statistics.median(times) for name, times in self.taken.items()}
        rate = case.work / medians[OURS] / SCALE[case.unit]
        key = ceilings.key(case.limit, case.rows)
        found = {
            "operator": case.operator, "name": case.name, "shape": case.shape, "implementation": case.implementation,
            "median_s": medians[OURS], "rounds": len(self.taken[OURS]), "rate": rate, "unit": case.unit,
            "work": case.work, "limit": case.limit, "ceiling": key, "share": rate / ceilings.of(key),
            "peers": {name: value for name, value in medians.items() if name != OURS},
            "ratios": {name: value / medians[OURS] for name, value in medians.items() if name != OURS},
        }  # fmt: skip
        if self.by_events:
            found["timed_with_launches"] = sorted(self.by_events)
        if case.tokens:
            found["tokens_per_s"] = {name: case.tokens / value for name, value in medians.items()}
        return found | ({"failed_peers": self.failed} if self.failed else {}) | case.notes


def measure(case: Case, device: torch.device, ceilings: Ceilings, budget: float = 2.0) -> dict[str, Any]:
    """The row of a case, without pytest."""
    pair = Pair(case, device, budget)
    for _ in range(pair.rounds):
        pair.peers()
        pair.ours()
    return pair.row(ceilings)


def parts(result: object) -> list[Tensor]:
    """The tensors of a result."""
    if isinstance(result, Tensor):
        return [result]
    assert isinstance(result, tuple | list)
    return [part for part in result if isinstance(part, Tensor)]


def distance(actual: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest wanted magnitude; infinite for NaN."""
    assert actual.shape == wanted.shape, f"{tuple(actual.shape)} beside {tuple(wanted.shape)}"
    scale = max(wanted.abs().max().double().item(), 1e-30)
    difference = (actual.double() - wanted.double()).abs().max().item() / scale
    return difference if math.isfinite(difference) else math.inf
