"""A profile of some steps, on request: a trace for Perfetto or chrome://tracing, and the ten dearest operators."""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from jindo_core.errors import Stopped
from jindo_core.files import write_atomically
from jindo_core.kernels import dispatch
from jindo_core.training_view import TrainingView

TRACE, TABLE = "trace.json.gz", "profile.txt"

WARM = 2
"""Steps before the first that is profiled: they allocate, and compile."""

DEAREST = 10
"""Operators that the table has."""

_STEP = "training step"
_HIDDEN = ".profile-"


@dataclass
class Operator:
    """What one operator took in all profiled steps. own, device: seconds, without those of the operators that it
    called; device: on the GPU."""

    name: str
    calls: int = 0
    own: float = 0.0
    device: float = 0.0


class StepProfile:
    """A context manager round a run's steps, of which it profiles some; the others run as without it.

    Args:
        steps: to profile, 0 for none. left: steps of the run. Where there are more than WARM, so many go before.
        folder: for both files.
    """

    def __init__(self, steps: int, left: int, folder: Path, device: torch.device, view: TrainingView) -> None:
        self._before = WARM if left > WARM else 0
        self._left = self._asked = min(steps, left - self._before)
        self._folder, self._view, self._cuda = folder, view, device.type == "cuda"
        self._profile: profile | None = None
        self._naming = contextlib.ExitStack()

    def __enter__(self) -> StepProfile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._left <= 0:
            return
        found, done = None if self._profile is None else self._stop(), self._asked - self._left
        if found is not None and done and (kind is None or issubclass(kind, Stopped)):
            self._view.notice(f"the run ends within the profiled steps: the profile has {done} of {self._asked}")
            self._write(found)
        elif kind is None or issubclass(kind, Exception):
            self._view.notice("no profile is written: the run ends before its profiled steps have")

    @contextlib.contextmanager
    def step(self) -> Iterator[bool]:
        """Round one step; whether it is profiled. The profiler starts before the block and is written behind it."""
        if self._left <= 0 or self._before > 0:
            yield False
            self._before -= 1
            return
        if self._profile is None:
            self._start()
        with record_function(_STEP):
            yield True
        self._left -= 1
        if self._left == 0:
            self._write(self._stop())

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self._profile = profile(activities=activities)
        self._profile.start()
        self._naming.enter_context(dispatch.named())

    def _stop(self) -> profile:
        found, self._profile = self._profile, None
        assert found is not None
        self._naming.close()
        found.stop()
        return found

    def _write(self, found: profile) -> None:
        """The files, and the table for the user. Without room for them the run goes on."""
        text = table(found.events())
        self._view.say(text)
        try:
            write_atomically(self._folder / TABLE, (text + "\n").encode())
            _write_trace(found, self._folder / TRACE)
        except OSError as error:
            self._view.notice(f"the profile could not be written ({error.strerror}), and the run goes on")
            return
        self._view.say(f"{TRACE} (for ui.perfetto.dev) and {TABLE} are in output_dir")


def clear(folder: Path) -> None:
    """Remove what a run left that was killed while it wrote its profile. The folder must be `files.held`."""
    for left in folder.glob(f"{_HIDDEN}*"):
        shutil.rmtree(left)


def _write_trace(found: profile, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_HIDDEN) as folder:
        raw, packed = Path(folder) / "trace.json", Path(folder) / TRACE
        found.export_chrome_trace(str(raw))
        with open(raw, encoding="utf-8") as lines, gzip.open(packed, "wt", encoding="utf-8") as out:
            for line in lines:  # the file's own name says where it lay
                out.write(re.sub(r'"traceName": ".*"', '"traceName": "trace.json"', line))
        os.replace(packed, path)


def dearest(events: Sequence[Any], cuda: bool = False) -> tuple[list[Operator], float, int]:
    """The operators of all profiled steps, the dearest first; the steps' seconds, and how many they were.

    Args:
        events: of torch's profiler; what lies outside the steps (a measurement, a checkpoint) does not count, nor what
            other threads did meanwhile: the steps' seconds are one thread's.
        cuda: by their time on the GPU.
    """
    steps = [event for event in events if event.name == _STEP and event.device_type == _CPU]

    def counts(event: Any) -> bool:
        began, thread = event.time_range.start, event.thread
        return event.device_type == _CPU and any(
            step.thread == thread and step.time_range.start <= began < step.time_range.end for step in steps
        )

    found: dict[str, Operator] = {}
    for event in events:
        if not counts(event):
            continue
        name = "Python and what has no name" if event.name == _STEP else event.name
        one = found.setdefault(name, Operator(name))
        one.calls += 1
        one.own += event.self_cpu_time_total / 1e6
        one.device += event.self_device_time_total / 1e6
    ordered = sorted(found.values(), key=lambda one: -(one.device if cuda else one.own))
    return ordered, sum(step.time_range.elapsed_us() for step in steps) / 1e6, len(steps)


_CPU = torch.autograd.DeviceType.CPU


def table(events: Sequence[Any]) -> str:
    """The dearest operators, in words that need no wide terminal."""
    cuda = any(event.device_type == torch.autograd.DeviceType.CUDA for event in events)
    operators, seconds, steps = dearest(events, cuda)
    head = f"{'operator':<36} {'calls':>7} {'own ms':>9} {'share':>6}" + (f" {'GPU ms':>9}" if cuda else "")
    what = "1 step" if steps == 1 else f"{steps} steps"
    lines = [f"{what}, {seconds:.3f} s under the profiler; own time in all of them", head]
    for one in operators[:DEAREST]:
        name = one.name if len(one.name) <= 36 else one.name[:35] + "…"
        device = f" {one.device * 1e3:9.1f}" if cuda else ""
        lines.append(f"{name:<36} {one.calls:7,} {one.own * 1e3:9.1f} {one.own / seconds:6.1%}{device}")
    return "\n".join(lines)
