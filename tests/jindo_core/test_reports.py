"""What TensorBoard and wandb are told of a run: the rows of metrics.jsonl, each step once, and no secret."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import sys

import pytest
import torch
from short_runs import logged, rows_file, settings_of, signal_at
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from jindo_core import outcome, reports
from jindo_core import train as training
from jindo_core.config import TrainConfig, resolve_train_config
from jindo_core.errors import InputError, Stopped
from jindo_core.reports import asked, check, open_reports, tagged

FAKE = '''
"""Keeps what it is told, as wandb's client would send it."""
import json, os, pathlib
from types import SimpleNamespace

class Error(Exception): pass
class CommError(Error): pass
class UsageError(Error): pass
class AuthenticationError(CommError): pass
errors = SimpleNamespace(
    Error=Error, CommError=CommError, UsageError=UsageError, AuthenticationError=AuthenticationError,
)
calls, fail_with = [], {}

def _said(call, /, **what):
    if call in fail_with:
        raise fail_with[call]
    calls.append((call, what))

class Settings:
    def __init__(self, **given): self.given = given

class Histogram:
    def __init__(self, np_histogram): self.counts, self.edges = np_histogram

class Artifact:
    def __init__(self, **given): self.given, self.files = given, {}
    def add_file(self, path): self.files[os.path.basename(path)] = pathlib.Path(path).read_bytes()
    def new_file(self, name, mode):
        import io, contextlib
        @contextlib.contextmanager
        def opened():
            file = io.StringIO()
            yield file
            self.files[name] = file.getvalue().encode()
        return opened()

class Run:
    def __init__(self): self.summary = {}
    def define_metric(self, name, **how): _said("define_metric", metric=name, **how)
    def log(self, row): _said("log", **row)
    def log_artifact(self, artifact): _said("log_artifact", files=artifact.files, **artifact.given)
    def finish(self, exit_code): _said("finish", exit_code=exit_code, summary=dict(self.summary))

def init(**given):
    _said("init", **given)
    return Run()
'''


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A module of that name which records its calls."""
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "wandb.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb

    yield wandb
    sys.modules.pop("wandb", None)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(outcome, "ANSWER_TOKENS", 4)
    monkeypatch.setattr(training, "draw_loss", lambda *_: None)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)


@pytest.fixture
def run(stories260k, tmp_path):
    """run("out", …) trains; its folder."""

    def start(out, **changes):
        training.train(*settings_of(stories260k, rows_file(tmp_path), tmp_path / out, **changes))
        return tmp_path / out

    return start


def curves(folder):
    """{(step, tag): value}, as TensorBoard reads them; no step may be there twice."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    found = [(one.step, tag, one.value) for tag in events.Tags()["scalars"] for one in events.Scalars(tag)]
    assert len({(step, tag) for step, tag, _ in found}) == len(found)
    return {(step, tag): value for step, tag, value in found}


def expected(rows):
    """What metrics.jsonl says, in the same form."""
    found = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and value is not None:
                group, _, rest = name.partition("_")
                found[row["step"], f"eval/{rest}" if group == "eval" else f"train/{name}"] = value
    return found


# --- TensorBoard ------------------------------------------------------------------------------------------


def test_tensorboard_reads_what_metrics_jsonl_says(run, tmp_path):
    out = run("out", report_to="tensorboard")
    found, wanted = curves(out / "runs"), expected(logged(out))
    assert found == {key: pytest.approx(value, rel=1e-6) for key, value in wanted.items()}
    assert {(0, "eval/loss"), (2, "eval/perplexity"), (6, "train/loss")} <= found.keys()
    events = EventAccumulator(str(out / "runs")).Reload()
    text = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '| data_path | ["rows.json"] |' in text
    held = b"".join(path.read_bytes() for path in (out / "runs").iterdir())
    assert str(tmp_path).encode() not in held
    assert os.uname().nodename not in " ".join(path.name for path in (out / "runs").iterdir())


def test_a_run_that_goes_on_goes_on_with_its_curves(run, monkeypatch, tmp_path):
    """Also where steps were done that no checkpoint has, and where the folder held another run."""
    folder = tmp_path / "curves"
    more = {"report_to": "tensorboard", "logging_dir": str(folder)}
    run("other", **more, max_steps=8)
    monkeypatch.setattr(training, "take_step", signal_at(5, training.take_step))
    with pytest.raises(Stopped):
        run("out", **more)
    out = run("out", **more, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert curves(folder) == {key: pytest.approx(value, rel=1e-6) for key, value in expected(logged(out)).items()}
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("before", ["none", "tensorboard"])
def test_a_resume_tells_tensorboard_what_it_lacks(before, run, monkeypatch):
    """All, where nothing was reported before; nothing twice where all was."""
    original = training.take_step
    monkeypatch.setattr(training, "take_step", signal_at(3, original))
    with pytest.raises(Stopped):
        run("out", report_to=before)
    monkeypatch.setattr(training, "take_step", original)
    out = run("out", report_to="tensorboard", resume=True)
    found = curves(out / "runs")
    assert found == {key: pytest.approx(value, rel=1e-6) for key, value in expected(logged(out)).items()}
    newest = sorted((out / "runs").iterdir())[-1]
    first = min(event.step for event in EventFileLoader(str(newest)).Load() if event.HasField("summary"))
    assert first == (4 if before == "tensorboard" else 0)


def test_a_resume_mends_curves_that_a_full_disk_cut(run, monkeypatch):
    """From the middle of a step: its row was written, its measurement was not."""
    write, take = reports._TensorBoard.log, training.take_step

    def full(self, row):
        if row["step"] == 2 and "eval_loss" in row:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, row)

    monkeypatch.setattr(reports._TensorBoard, "log", full)
    monkeypatch.setattr(training, "take_step", signal_at(5, take))
    with pytest.raises(Stopped):
        run("out", report_to="tensorboard")
    monkeypatch.setattr(training, "take_step", take)
    monkeypatch.setattr(reports._TensorBoard, "log", write)
    out = run("out", report_to="tensorboard", resume=True)
    assert curves(out / "runs") == {key: pytest.approx(v, rel=1e-6) for key, v in expected(logged(out)).items()}


def test_a_resume_tells_wandb_what_it_lacks(wandb, run, monkeypatch, tmp_path):
    """It was lost at step 2 and the run stopped at 5; then one that only begins with the resume."""
    take, log = training.take_step, wandb.Run.log

    def broken(self, row):
        if row["step"] == 2 and "train/loss" in row:
            raise wandb.CommError("no network")
        log(self, row)

    monkeypatch.setattr(wandb.Run, "log", broken)
    monkeypatch.setattr(training, "take_step", signal_at(5, take))
    with pytest.raises(Stopped):
        run("out", report_to="wandb")
    monkeypatch.setattr(wandb.Run, "log", log)
    monkeypatch.setattr(training, "take_step", signal_at(5, take))
    with pytest.raises(Stopped):
        run("late")
    monkeypatch.setattr(training, "take_step", take)
    told = []
    for name in ("out", "late"):
        out = run(name, report_to="wandb", resume=True)
        told, wandb.calls[:] = [row for kind, row in wandb.calls if kind == "log"], []
        assert [(row["step"], "train/loss" in row) for row in told] == [
            (row["step"], "loss" in row) for row in logged(out)
        ]  # fmt: skip


def test_gradients_are_only_kept_for_a_histogram_and_hooks_go(wandb, tmp_path):
    model, config = torch.nn.Linear(3, 2, bias=False), TrainConfig(report_to="wandb", wandb_watch="gradients")
    opened = open_reports(config, tmp_path, None, print, model)
    (sink,), hooks = opened._sinks, model.weight._post_accumulate_grad_hooks
    for step, kept in ((1, 1), (2, 0)):
        model(torch.ones(4, 3)).sum().backward()
        assert len(sink._watched._gradients) == kept
        opened.log({"step": step, "loss": 1.0})
    assert len(hooks) == 1
    wandb.fail_with["log"] = wandb.CommError("no network")
    opened.log({"step": 3, "loss": 1.0})
    assert len(hooks) == 0
    wandb.fail_with.clear()
    with open_reports(config, tmp_path, 3, print, model) as again:
        assert len(model.weight._post_accumulate_grad_hooks) == 1
        again.log({"step": 1, "loss": 1.0})  # told before; and no step is made now
    assert len(model.weight._post_accumulate_grad_hooks) == 0


def test_a_kill_loses_no_row(tmp_path):
    """What `log` was told is in the file."""
    child = os.fork()
    if child == 0:
        opened = open_reports(TrainConfig(report_to="tensorboard"), tmp_path, None, print)
        for step in range(1, 4):
            opened.log({"step": step, "loss": step / 2})
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert curves(tmp_path / "runs") == {(step, "train/loss"): step / 2 for step in (1, 2, 3)}


def test_what_has_no_number_is_left_out():
    row = {"step": 3, "epoch": None, "loss": math.nan, "grad_norm": math.inf, "tokens": 7, "eval_loss": 2.0}
    assert tagged(row) == {"train/tokens": 7, "eval/loss": 2.0}
    assert tagged({"step": 0, "mmlu_eval_accuracy": 0.25, "mmlu_loss": 1.5}) == {
        "mmlu/eval_accuracy": 0.25, "mmlu/loss": 1.5,
    }  # fmt: skip


def test_figures_of_predictions_come_last(run, wandb):
    out = run("out", report_to="tensorboard,wandb", predict_with_generate=True, max_new_tokens=4, max_steps=2)
    figures = json.loads((out / "metrics.json").read_text())
    found = {tag: value for (step, tag), value in curves(out / "runs").items() if step == 2}
    assert found["predict/samples"] == figures["predict_samples"] == 4
    assert found["predict/chrf"] == pytest.approx(figures["predict_chrf"], rel=1e-6)
    assert wandb.calls[-1][1]["summary"]["results/predict_chrf"] == figures["predict_chrf"]


# --- a place that fails -----------------------------------------------------------------------------------


def test_a_full_disk_costs_the_curves_and_not_the_run(run, monkeypatch, capsys):
    original, rows = reports._TensorBoard.log, []

    def full(self, row):
        rows.append(row)
        if len(rows) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/home/me/secret")
        original(self, row)

    monkeypatch.setattr(reports._TensorBoard, "log", full)
    out = run("out", report_to="tensorboard")
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("TensorBoard takes no more (No space left on device): the run goes on without it") == 1
    assert len(rows) == 3
    assert [row["step"] for row in logged(out) if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_a_folder_that_takes_no_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    config = TrainConfig(report_to="tensorboard", logging_dir=str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"can't be written to .*file .*: give another --logging_dir"):
        open_reports(config, tmp_path, None, print)


@pytest.mark.parametrize("failure", [OSError(errno.EPIPE, "Broken pipe"), "CommError"])
def test_wandb_may_fail_on_the_way(failure, wandb, run, monkeypatch, capsys):
    """And goes on with the same run at the next resume, from where it was."""
    error = getattr(wandb, failure)("no network") if isinstance(failure, str) else failure
    original, given = wandb.Run.log, []

    def broken(self, row):
        given.append(row["step"])
        if row["step"] == 2 and "train/loss" in row:
            raise error
        original(self, row)

    monkeypatch.setattr(wandb.Run, "log", broken)
    out = run("out", wandb_project="p")
    assert given == [0, 1, 2]
    assert len(logged(out)) == 10
    assert " ".join(capsys.readouterr().out.split()).count("wandb takes no more") == 1
    held = json.loads((out / "wandb_run.json").read_text())
    assert (held["told"], held["closed"]) == ({"eval_loss": 0, "loss": 1}, True)


def test_wandb_may_not_begin(wandb, run, capsys, tmp_path):
    wandb.fail_with["init"] = wandb.CommError("no answer")
    run("out", report_to="wandb")
    said = " ".join(capsys.readouterr().out.split())
    assert "note: wandb can't begin (no answer): the run goes without it; WANDB_MODE=offline keeps its figures" in said
    wandb.fail_with["init"] = wandb.UsageError("api_key not configured (no-tty)")
    with pytest.raises(InputError, match=r"wandb can't begin \(api_key not .*: wandb login, or WANDB_MODE=offline"):
        run("other", report_to="wandb")


# --- wandb ------------------------------------------------------------------------------------------------


def test_wandb_is_told_the_same_and_no_secret(wandb, run, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    out = run("out", wandb_project="p", wandb_run_name="first try", wandb_watch="all", wandb_log_model=True)
    kinds = [name for name, _ in wandb.calls]
    assert kinds == ["init", "define_metric", "define_metric", *["log"] * 10, "log_artifact", "finish"]
    begun = wandb.calls[0][1]
    assert (begun["project"], begun["name"], begun["resume"]) == ("p", "first try", "allow")
    assert begun["dir"] == str(out)
    assert begun["config"]["data_path"] == ["rows.json"]
    assert begun["config"]["base_model"] == "stories260K-hf"
    assert begun["settings"].given["x_disable_meta"] is True
    rows = [{k: v for k, v in row.items() if "s/" not in k} for name, row in wandb.calls if name == "log"]
    assert [row.pop("step") for row in rows] == [row["step"] for row in logged(out)]
    assert rows == [tagged(row) for row in logged(out)]
    model, ended = wandb.calls[-2][1], wandb.calls[-1][1]
    assert sorted(model["files"]) == ["adapter_config.json", "adapter_model.safetensors", "metrics.jsonl"]
    assert model["files"]["adapter_model.safetensors"] == (out / "adapter_model.safetensors").read_bytes()
    assert json.loads(model["files"]["adapter_config.json"])["base_model_name_or_path"] == "stories260K-hf"
    assert ended["exit_code"] == 0
    assert ended["summary"]["results/steps"] == 6
    told = repr([{**call, "dir": ""} for _, call in wandb.calls])
    assert str(tmp_path) not in told
    assert "hf_secret" not in told


@pytest.mark.parametrize(("watch", "kinds"), [("all", {"gradients", "parameters"}), ("gradients", {"gradients"})])
def test_wandb_gets_histograms_of_what_is_trained(watch, kinds, wandb, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 5, bias=False), torch.nn.Linear(5, 2, bias=False))
    model[0].requires_grad_(False)
    config = TrainConfig(report_to="wandb", wandb_watch=watch)
    with open_reports(config, tmp_path, None, print, model) as opened:
        for step in (1, 2, 99, 100):
            model(torch.ones(4, 3)).square().sum().backward()
            model(torch.ones(4, 3)).square().sum().backward()  # a second micro-batch
            gradient = model[1].weight.grad.clone()
            model.zero_grad(set_to_none=True)
            opened.log({"step": step, "loss": 1.0})
    rows = [row for name, row in wandb.calls if name == "log"]
    assert [len(row) for row in rows] == [2 + len(kinds), 2, 2, 2 + len(kinds)]
    assert {name for name in rows[3] if "weight" in name} == {f"{kind}/1.weight" for kind in kinds}
    found = rows[3]["gradients/1.weight"]
    assert found.counts.sum() == 10
    assert (found.edges[0], found.edges[-1]) == pytest.approx((gradient.min().item(), gradient.max().item()))


def test_wandb_goes_on_under_the_same_id_with_each_step_once(wandb, run, monkeypatch, tmp_path):
    original = training.take_step
    monkeypatch.setattr(training, "take_step", signal_at(5, original))
    with pytest.raises(Stopped):
        run("out", report_to="wandb")
    assert wandb.calls[-1] == ("finish", {"exit_code": 1, "summary": {}})
    monkeypatch.setattr(training, "take_step", original)
    out = run("out", report_to="wandb", resume=True)
    ids = [call["id"] for name, call in wandb.calls if name == "init"]
    assert ids[0] == ids[1]
    rows = [row for name, row in wandb.calls if name == "log"]
    assert [(row["step"], "train/loss" in row) for row in rows] == [
        (row["step"], "loss" in row) for row in logged(out)
    ]  # fmt: skip
    run("out", report_to="wandb", overwrite_output_dir=True)
    assert [call["id"] for name, call in wandb.calls if name == "init"][2] != ids[0]


def test_wandb_is_not_told_again_what_a_killed_run_told(wandb, tmp_path):
    """The log says how far a run came that had no time to close: its last line may be cut."""
    (tmp_path / "wandb_run.json").write_text(json.dumps({"id": "abc", "told": {"loss": 1}, "closed": False}))
    rows = [{"step": 0, "eval_loss": 3.0}, *({"step": step, "loss": 2.0} for step in (1, 2, 3, 4))]
    (tmp_path / "metrics.jsonl.part").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 5, "lo')
    with open_reports(TrainConfig(report_to="wandb"), tmp_path, 3, print) as opened:
        opened.log(rows[0])
        for step in (1, 2, 3, 4, 5):
            opened.log({"step": step, "loss": 2.0})
        opened.log({"step": 4, "eval_loss": 2.5})
        opened.log({"step": 4, "mmlu_loss": 1.0, "mmlu_test_accuracy": 0.25})  # of either split
    assert wandb.calls[0][1]["id"] == "abc"
    assert [row["step"] for name, row in wandb.calls if name == "log"] == [5, 4, 4]
    assert wandb.calls[-2][1]["mmlu/test_accuracy"] == 0.25
    held = json.loads((tmp_path / "wandb_run.json").read_text())
    assert held == {"id": "abc", "told": {"loss": 5, "eval_loss": 4, "mmlu_loss": 4}, "closed": True}
    open_reports(TrainConfig(), tmp_path, 5, print).close()  # goes on without wandb, which then lacks steps
    assert not (tmp_path / "wandb_run.json").exists()


def test_a_damaged_file_of_wandbs_run_is_an_error(wandb, tmp_path):
    (tmp_path / "wandb_run.json").write_text('{"id": 3}')
    with pytest.raises(InputError, match=r"wandb_run.json has no id of a run: remove it"):
        open_reports(TrainConfig(report_to="wandb"), tmp_path, 3, print)


# --- what is asked for ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "environment", "names"),
    [
        ({}, "", ()),
        ({}, "p", ("wandb",)),
        ({"report_to": "none"}, "p", ()),
        ({"report_to": "tensorboard"}, "p", ("tensorboard",)),
        ({"report_to": "tensorboard", "wandb_project": "p"}, "", ("tensorboard", "wandb")),
        ({"report_to": "WandB,tensorboard"}, "", ("tensorboard", "wandb")),
        ({"report_to": "all"}, "", ("tensorboard",)),
        ({"report_to": "", "wandb_project": "", "wandb_watch": "", "wandb_run_name": ""}, "", ()),
    ],
)
def test_what_is_reported_to(given, environment, names, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", environment)
    monkeypatch.setattr(reports, "is_installed", lambda name: name == "tensorboard")
    assert asked(resolve_train_config({"base_model": "m", **given})[0]) == names


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"report_to": "mlflow"}, "--report_to: got 'mlflow', expected tensorboard and wandb, or all or none alone"),
        ({"report_to": "tensorbord"}, "Did you mean 'tensorboard'?"),
        ({"report_to": "all wandb"}, "--report_to: got all,wandb, expected"),
        ({"report_to": "none", "wandb_project": "p"}, "--wandb_project: got it beside --report_to none"),
        ({"wandb_watch": "weights"}, "--wandb_watch: got 'weights', expected one of false, gradients, all"),
        ({"wandb_log_model": "end"}, "--wandb_log_model: got 'end', expected True or False"),
    ],
)
def test_what_is_refused(given, part):
    with pytest.raises(InputError) as caught:
        resolve_train_config({"base_model": "m", **given})
    assert part in str(caught.value)


def test_what_is_not_installed_is_an_error_before_anything_is_read(stories260k, tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "is_installed", lambda name: False)
    monkeypatch.setattr(training, "prepare", lambda *_: pytest.fail("it read on"))
    out = tmp_path / "out"
    for given, why in (({"report_to": "tensorboard"}, "--report_to"), ({"wandb_project": "p"}, "--wandb_project")):
        with pytest.raises(InputError, match=rf"^{why} asks for \w+, which is not installed: pip install "):
            training.train(*settings_of(stories260k, rows_file(tmp_path), out, **given))
    monkeypatch.setenv("WANDB_PROJECT", "p")
    with pytest.raises(InputError, match=r"^WANDB_PROJECT in the environment asks for wandb, .*or .*--report_to none"):
        training.train(*settings_of(stories260k, rows_file(tmp_path), out))
    assert not out.exists()


def test_settings_without_an_effect_are_said():
    said = []
    check(TrainConfig(wandb_run_name="r", wandb_watch="all", logging_dir="d"), said.append)
    assert said == [
        "--wandb_run_name, --wandb_watch: no effect without wandb (--wandb_project, or --report_to wandb)",
        "--logging_dir: no effect without --report_to tensorboard; every step is written to metrics.jsonl",
    ]


def test_a_folder_of_wandbs_runs_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert not reports.is_installed("wandb")
