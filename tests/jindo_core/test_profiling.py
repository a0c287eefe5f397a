"""A profile on request: what it holds, which steps, and that nothing else is changed by it."""

from __future__ import annotations

import gzip
import json
from types import SimpleNamespace

import pytest
import torch
from short_runs import signal_at

from jindo_core import prepare, profiling
from jindo_core import train as training
from jindo_core.adapters import WEIGHTS
from jindo_core.config import resolve_train_config
from jindo_core.errors import Stopped
from jindo_core.kernels import dispatch
from jindo_core.kernels.nf4 import nf4_quantize
from jindo_core.profiling import StepProfile


@pytest.fixture
def settings(stories260k, tmp_path):
    data = [{"instruction": f"Count {i}.", "output": "one two three" + " and" * (i % 5)} for i in range(24)]
    (tmp_path / "rows.json").write_text(json.dumps(data))
    given = {
        "base_model": str(stories260k), "data_path": str(tmp_path / "rows.json"), "batch_size": 8,
        "micro_batch_size": 4, "max_steps": 4, "val_set_size": 4, "eval_steps": 3, "lora_r": 2, "lora_dropout": 0.2,
        "save_steps": 0, "prompt_template_name": "alpaca_short", "device": "cpu", "dtype": "fp32", "cutoff_len": 96,
        "lora_target_modules": "all-linear",
    }  # fmt: skip
    return lambda out, **more: resolve_train_config(given | {"output_dir": str(tmp_path / out)} | more)


def test_a_profiled_run_ends_the_same_and_names_our_operators(settings, tmp_path, capsys):
    training.train(*settings("plain"))
    assert "own time" not in capsys.readouterr().out
    training.train(*settings("profiled", profile=2))
    said = capsys.readouterr().out
    assert (tmp_path / "plain" / WEIGHTS).read_bytes() == (tmp_path / "profiled" / WEIGHTS).read_bytes()
    text = (tmp_path / "profiled" / "profile.txt").read_text()
    head, columns, *lines = text.splitlines()
    assert head.startswith("2 steps, ")
    assert columns.split() == ["operator", "calls", "own", "ms", "share"]
    assert len(lines) == profiling.DEAREST
    assert all(line in said for line in (head, columns, *lines))
    owns = [float(line.split()[-2].replace(",", "")) for line in lines]
    assert owns == sorted(owns, reverse=True)
    shares = [float(line.split()[-1].rstrip("%")) for line in lines]
    assert 0 < sum(shares) <= 100.5
    with gzip.open(tmp_path / "profiled" / "trace.json.gz", "rt") as file:
        trace = json.load(file)
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert names.count("training step") == 2
    # Of 5 layers, in 2 steps of 2 micro-batches: q with k and v, o, gate with up, down.
    assert sum(name.startswith("jindo::lora_matmul (") for name in names) == 5 * 4 * 2 * 2
    for name in ("lora_matmul_backward", "linear_cross_entropy", "rms_norm", "swiglu", "rope", "adamw"):
        assert any(one.startswith(f"jindo::{name} (") for one in names), name
    assert str(tmp_path) not in json.dumps(trace)
    assert not list((tmp_path / "profiled").glob(".profile*"))


def test_a_measurement_between_the_steps_does_not_count():
    with StepProfileOf(2, left=5) as profile:
        for number in range(3):
            with profile.step():
                torch.ones(3) if number == 2 else torch.zeros(3)
        torch.eye(3)  # a measurement
        with profile.step():
            torch.ones(3)
    operators, seconds, steps = profile.found
    calls = {one.name: one.calls for one in operators}
    assert (steps, calls.get("aten::ones"), calls.get("aten::eye"), calls.get("aten::zeros")) == (2, 2, None, None)
    assert sum(one.own for one in operators) == pytest.approx(seconds, rel=0.05)


@pytest.mark.parametrize(
    ("steps", "left", "expected"), [(3, 10, [2, 3, 4]), (3, 4, [2, 3]), (3, 2, [0, 1]), (1, 1, [0]), (0, 5, [])]
)
def test_which_steps(steps, left, expected):
    running = []
    with StepProfileOf(steps, left) as profile:
        for number in range(left):
            with profile.step():
                if profile._profile is not None:
                    running.append(number)
    assert running == expected


class StepProfileOf(StepProfile):
    """Keeps what it found instead of writing it."""

    def __init__(self, steps, left):
        self.said = []
        super().__init__(steps, left, None, torch.device("cpu"), SimpleNamespace(notice=self.said.append))

    def _write(self, found):
        self.found = profiling.dearest(found.events())


def test_a_step_that_fails_leaves_no_profiler_running():
    profile = StepProfileOf(3, 1)
    with pytest.raises(ZeroDivisionError), profile, profile.step():
        1 / 0  # noqa: B018
    assert profile._profile is None
    assert profile.said == ["no profile is written: the run ends before its profiled steps have"]
    assert dispatch.implementation("nf4_quantize", torch.zeros(2)).__name__ != "under"


def test_without_room_the_run_goes_on(tmp_path):
    said = []
    view = SimpleNamespace(say=said.append, notice=said.append)
    with StepProfile(1, 1, tmp_path / "gone", torch.device("cpu"), view) as profile, profile.step():
        torch.ones(3)
    assert said[-1] == "the profile could not be written (No such file or directory), and the run goes on"


def test_operators_have_names_only_while_asked_for():
    weight = torch.randn(64, 64)
    with torch.profiler.profile() as found:
        nf4_quantize(weight, 64)
        with dispatch.named():
            nf4_quantize(weight, 64)
    named = [event for event in found.events() if event.name.startswith("jindo::nf4_quantize (")]
    assert len(named) == 1


# --- when a run ends early, and what of other threads and steps -------------------------------------------------


@pytest.mark.parametrize(("at", "words"), [(2, "its profiled steps have"), (3, "the profile has 1 of 2")])
def test_a_run_that_is_stopped_says_what_became_of_the_profile(at, words, settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "take_step", signal_at(at, training.take_step))
    with pytest.raises(Stopped):
        training.train(*settings("out", profile=2))
    said = " ".join(capsys.readouterr().out.split())
    assert words in said
    text = tmp_path / "out" / "profile.txt"
    assert text.exists() == (at == 3)
    assert at == 2 or text.read_text().startswith("1 step, ")


def test_what_a_kill_left_of_a_profile_is_removed(settings, tmp_path):
    left = tmp_path / "out" / ".profile-abc"
    left.mkdir(parents=True)
    (left / "trace.json").write_text("{")
    training.train(*settings("out", max_steps=1))
    assert not left.exists()


def test_other_threads_do_not_count():
    def event(name, thread, start, end):
        span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return SimpleNamespace(
            name=name, thread=thread, time_range=span, device_type=torch.autograd.DeviceType.CPU,
            self_cpu_time_total=end - start, self_device_time_total=0,
        )  # fmt: skip

    events = [
        event("training step", 1, 0, 100), event("aten::mm", 1, 10, 30), event("aten::index", 2, 20, 90),
        event("training step", 1, 200, 300), event("aten::mm", 1, 210, 230), event("aten::mm", 1, 120, 130),
    ]  # fmt: skip
    operators, seconds, steps = profiling.dearest(events)
    assert [(one.name, one.calls) for one in operators if one.name.startswith("aten")] == [("aten::mm", 2)]
    assert (seconds, steps) == (pytest.approx(200e-6), 2)


class Clock:
    """In place of the loop's: moves when it is told to."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def takes(self, seconds, run):
        def taking(*given, **more):
            self.now += seconds if isinstance(seconds, int) else next(seconds)
            return run(*given, **more)

        return taking


def rates(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["seconds"], row["tokens"], row["tokens_per_second"]) for row in rows if "loss" in row]


def test_profiling_is_no_step_s_time_and_its_steps_are_not_in_the_rate(settings, tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(training, "time", clock)
    monkeypatch.setattr(training, "take_step", clock.takes(1, training.take_step))
    for name in ("_start", "_stop", "_write"):
        monkeypatch.setattr(StepProfile, name, clock.takes(1000, getattr(StepProfile, name)))
    result = training.train(*settings("out", profile=1))
    found = rates(tmp_path / "out")
    assert [seconds for seconds, _, _ in found] == [1, 2, 3, 4]
    tokens = [tokens for _, tokens, _ in found]
    usual = tokens[3] - (tokens[2] - tokens[1])
    assert result.tokens_per_second == found[3][2] == pytest.approx(usual / 3)


def test_steps_that_compile_are_not_in_the_rate_nor_in_the_time_left(settings, tmp_path, monkeypatch):
    """And they are known as such behind a stop, too."""
    clock, graphs, left = Clock(), iter([0, 4, 4, 5, 0, 0, 0, 0]), []
    monkeypatch.setattr(training, "time", clock)
    monkeypatch.setattr(training, "take_step", clock.takes(iter([60, 30, 1, 1]), training.take_step))
    monkeypatch.setattr(training, "compiled_graphs", lambda: next(graphs))
    monkeypatch.setattr(prepare, "compile_layers", lambda _: None)
    original = training.TrainingView.step
    monkeypatch.setattr(
        training.TrainingView, "step", lambda view, *given: (left.append(given[2]), original(view, *given))
    )
    with monkeypatch.context() as patch:
        patch.setattr(training, "take_step", signal_at(3, training.take_step))
        with pytest.raises(Stopped):
            training.train(*settings("out", compile=True))
    training.train(*settings("out", compile=True, resume=True))
    found = rates(tmp_path / "out")
    assert [seconds for seconds, _, _ in found] == [60, 90, 91, 92]
    tokens = [0, *(tokens for _, tokens, _ in found)]
    assert found[1][2] == pytest.approx(tokens[2] / 90), "none is usual yet"
    assert found[3][2] == pytest.approx((tokens[4] - tokens[2]) / 2)
    assert left == [180, 90, 1, 0]
