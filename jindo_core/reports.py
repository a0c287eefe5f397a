"""Where a run's figures go besides metrics.jsonl: TensorBoard's event files, and wandb.

Every row of metrics.jsonl is reported under the tags that transformers gives such figures: `train/loss`, `eval/loss`;
MMLU's under `mmlu/`. What has no number (null) is left out. Nothing secret goes along: settings' paths are shortened to
their last part (`run_record.shown`), and wandb is told not to look at the machine, the code or the command line.

A run that goes on continues its curves, and tells all its rows once more. TensorBoard's files say which of them it has:
it is told to forget what it has from the first other one's step on (SessionLog.START, as SummaryWriter's purge_step),
and rows are written from there on. wandb keeps what it has: its run's id and how far that was told lie in
wandb_run.json, and rows are sent from there on.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from jindo_core.adapters import CONFIG, WEIGHTS
from jindo_core.config import TrainConfig
from jindo_core.config_checks import SINKS
from jindo_core.errors import InputError
from jindo_core.files import read_json, write_atomically
from jindo_core.run_record import METRICS, by_name, shown

WANDB_RUN = "wandb_run.json"
EVENTS = "runs"
"""The folder of TensorBoard's files in output_dir."""

_WATCHED_EVERY = 100
"""Steps between two histograms at least; transformers' own."""

_PIP = {"tensorboard": "pip install tensorboard, or jindo-core[reports]", "wandb": "pip install 'wandb>=0.20'"}


class Sink(Protocol):
    """One place that figures are reported to. A run that goes on tells its former rows first."""

    name: str

    @property
    def failures(self) -> tuple[type[Exception], ...]:
        """What a method may raise where the place can't be written to or reached."""

    def log(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl."""

    def finish(self, output_dir: Path, results: Mapping[str, Any]) -> None:
        """The run has ended well, and all its files are written."""

    def close(self, *, well: bool) -> None:
        """The run has ended."""


class Reports:
    """All places of a run. One that fails is told of once and then left off: a run never ends for its reports."""

    def __init__(self, sinks: list[Sink], notice: Callable[[str], None]) -> None:
        self._sinks, self._notice = sinks, notice

    def log(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl, as it comes."""
        self._each(lambda sink: sink.log(row))

    def finish(self, output_dir: Path, results: Mapping[str, Any]) -> None:
        """What the run ended with; all files of output_dir are written."""
        self._each(lambda sink: sink.finish(output_dir, results))

    def close(self, *, well: bool = True) -> None:
        """well: the run came to its end; otherwise it was stopped or failed."""
        self._each(lambda sink: sink.close(well=well))
        self._sinks = []

    def _each(self, do: Callable[[Sink], None]) -> None:
        for sink in tuple(self._sinks):
            try:
                do(sink)
            except sink.failures as error:
                self._sinks.remove(sink)
                self._notice(f"{sink.name} takes no more ({said(error)}): the run goes on without it")

    def __enter__(self) -> Reports:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(well=kind is None)


def said(error: Exception) -> str:
    """An error's reason in one line, without the path that Python puts into it."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def asked(config: TrainConfig) -> tuple[str, ...]:
    """The places that a run reports to. wandb is one where a project is named too, by --wandb_project or, as in
    alpaca-lora, by WANDB_PROJECT in the environment; that does not count beside --report_to."""
    given = config.report_to
    if given == ("all",):
        names = {name for name in SINKS if is_installed(name)}
    elif given is None:
        names = {"wandb"} if os.environ.get("WANDB_PROJECT") else set()
    else:
        names = set(given) - {"none"}
    if config.wandb_project is not None:
        names.add("wandb")
    return tuple(name for name in SINKS if name in names)


def check(config: TrainConfig, notice: Callable[[str], None]) -> None:
    """See that what is asked for can be had, before anything is loaded; tell of settings without an effect.

    Raises:
        InputError: a package is not installed.
    """
    names = asked(config)
    for name in names:
        if not is_installed(name):
            why = "--report_to" if name in (config.report_to or ()) else "--wandb_project"
            if why == "--wandb_project" and config.wandb_project is None:
                why = "WANDB_PROJECT in the environment"
            instead = "leave it out" if why == "--wandb_project" else "give --report_to none"
            raise InputError(f"{why} asks for {name}, which is not installed: {_PIP[name]}, or {instead}")
    if config.report_to == ("all",) and not names:
        notice("--report_to all: neither tensorboard nor wandb is installed, so nothing is reported")
    idle = [name for name in ("wandb_run_name", "wandb_watch", "wandb_log_model") if getattr(config, name)]
    if idle and "wandb" not in names:
        flags = ", ".join(f"--{name}" for name in idle)
        notice(f"{flags}: no effect without wandb (--wandb_project, or --report_to wandb)")
    if config.logging_dir is not None and "tensorboard" not in names:
        notice("--logging_dir: no effect without --report_to tensorboard; every step is written to metrics.jsonl")


def is_installed(name: str) -> bool:
    """Whether a package can be imported. A folder of that name, such as wandb keeps its runs in, is none."""
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None


def open_reports(
    config: TrainConfig, output_dir: Path, resumed_step: int | None, notice: Callable[[str], None],
    model: nn.Module | None = None,
) -> Reports:
    """Begin, or go on with, what a run reports. metrics.jsonl.part must not be begun anew yet: it says how far wandb
    was told.

    Args:
        resumed_step: the checkpoint's that the run goes on from, whose rows are logged again; None: a new run.
        notice: takes what the user should know. model: for wandb's histograms.
    Raises:
        InputError: a folder that can't be written to; wandb refuses the settings, or has no login.
    """
    names, sinks = asked(config), list[Sink]()
    if "tensorboard" in names:
        folder = Path(config.logging_dir or output_dir / EVENTS)
        try:
            sinks.append(_TensorBoard(folder, resumed_step, shown(config)))
        except OSError as error:
            found = f"TensorBoard's files can't be written to {folder} ({said(error)})"
            raise InputError(f"{found}: give another --logging_dir") from None
    if "wandb" not in names or resumed_step is None:
        (output_dir / WANDB_RUN).unlink(missing_ok=True)
    if "wandb" in names and (sink := _begin_wandb(config, output_dir, notice, model, resumed_step)) is not None:
        sinks.append(sink)
    return Reports(sinks, notice)


def tagged(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics.jsonl under their tags; step aside."""
    found = {}
    for name, value in row.items():
        if name == "step" or isinstance(value, bool | str) or value is None or not math.isfinite(value):
            continue
        group, _, rest = name.partition("_")
        found[f"{group}/{rest}" if group in ("eval", "mmlu", "predict") else f"train/{name}"] = value
    return found


# --- TensorBoard ------------------------------------------------------------------------------------------


class _TensorBoard:
    """An event file, written with the tensorboard package's own records.

    Not through torch's SummaryWriter: that writes on a thread, whose failure prints a traceback and whose queue a kill
    takes along. Here a row is in the file when `log` returns, and the file's name has no host in it.
    """

    name = "TensorBoard"
    failures = (OSError,)

    def __init__(self, folder: Path, resumed_step: int | None, settings: Mapping[str, Any]) -> None:
        """resumed_step: as in `open_reports`; of a new run, what the folder has counts no more."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._resumed, self._settings, self._begun = resumed_step, settings, False
        self._there = set() if resumed_step is None else _told_before(folder)
        self._of_step: list[tuple[int, Any]] = []
        # Files are read in the order of their names.
        now = time.time_ns()
        file = open(folder / f"events.out.tfevents.{now // 10**9:010d}.jindo-core.{now}", "wb")  # noqa: SIM115
        self._event, self._records = Event, RecordWriter(file)
        self._forget = SessionLog(status=SessionLog.START)
        self._write(file_version="brain.Event:2")
        if resumed_step is None:
            self._begin(0)

    def log(self, row: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        step = row["step"]
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in tagged(row).items()])
        if self._begun:
            self._write(step=step, summary=summary)
            return
        self._of_step = [(at, former) for at, former in self._of_step if at == step] + [(step, summary)]
        assert self._resumed is not None
        if step > self._resumed or (step, _mark(summary)) not in self._there:
            self._begin(step)
            for at, former in self._of_step:  # those of the step that the folder has are forgotten, too
                self._write(step=at, summary=former)

    def _begin(self, step: int) -> None:
        """What the folder has from this step on counts no more."""
        self._begun = True
        self._write(step=step, session_log=self._forget)
        self._write(step=step, summary=_text("settings", self._settings))

    def finish(self, output_dir: Path, results: Mapping[str, Any]) -> None:
        """Its rows have all but the figures of predictions."""
        found = {name: value for name, value in results.items() if name.startswith("predict_")}
        if found:
            self.log({"step": results["steps"], **found})

    def close(self, *, well: bool) -> None:
        self._records.close()

    def _write(self, **parts: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **parts).SerializeToString())
        self._records.flush()


def _told_before(folder: Path) -> set[tuple[int, bytes]]:
    """(step, mark) of the rows that count in a folder's files."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.compat.proto.event_pb2 import SessionLog

    found: set[tuple[int, bytes]] = set()
    for path in sorted(folder.glob("*tfevents*")):
        for event in LegacyEventFileLoader(str(path)).Load():  # up to where a kill cut it
            if event.session_log.status == SessionLog.START:
                found = {(step, mark) for step, mark in found if step < event.step}
            elif event.HasField("summary"):
                found.add((event.step, _mark(event.summary)))
    return found


def _mark(summary: Any) -> bytes:
    """Of a row's tags and values: those of another run at the same step are others."""
    return hashlib.blake2b(summary.SerializeToString(deterministic=True), digest_size=8).digest()


def _text(tag: str, settings: Mapping[str, Any]) -> Any:
    """A summary that TensorBoard shows as text: a table of settings."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    rows = [f"| {name} | {json.dumps(value, ensure_ascii=False)} |" for name, value in settings.items()]
    text = "\n".join(["| setting | value |", "|---|---|", *rows])
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()], tensor_shape=shape)
    data = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    return Summary(value=[Summary.Value(tag=f"{tag}/text_summary", metadata=data, tensor=tensor)])


# --- wandb ------------------------------------------------------------------------------------------------


def _begin_wandb(
    config: TrainConfig, output_dir: Path, notice: Callable[[str], None], model: nn.Module | None,
    resumed_step: int | None,
) -> _Wandb | None:
    """None, and a notice: its server can't be reached."""
    import wandb

    try:
        return _Wandb(config, output_dir, model, resumed_step)
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError, ValueError) as error:
        raise InputError(f"wandb can't begin ({said(error)}): wandb login, or WANDB_MODE=offline") from None
    except (wandb.errors.Error, OSError) as error:
        notice(f"wandb can't begin ({said(error)}): the run goes without it; WANDB_MODE=offline keeps its figures here")
        return None


class _Wandb:
    """A run of wandb's, the same one after a resume."""

    name = "wandb"

    def __init__(
        self, config: TrainConfig, output_dir: Path, model: nn.Module | None, resumed_step: int | None
    ) -> None:
        import wandb

        self._wandb, self._file, self._log_model = wandb, output_dir / WANDB_RUN, config.wandb_log_model
        self._id, self._told = _kept(output_dir)
        self._keep(closed=True)  # should wandb not begin now, it is as far as this
        settings = wandb.Settings(
            x_disable_meta=True, x_disable_machine_info=True, x_save_requirements=False, disable_git=True,
            disable_code=True, save_code=False, console="off", host="",
        )  # fmt: skip
        self._run = wandb.init(
            project=config.wandb_project, name=config.wandb_run_name, id=self._id, resume="allow", dir=str(output_dir),
            config=shown(config), settings=settings,
        )  # fmt: skip
        self._keep(closed=False)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step", step_sync=True)
        watch, self._watched = config.wandb_watch, None
        if model is not None and watch is not None and watch != "false":
            self._watched = _Watched(model, watch, config.logging_steps, resumed_step or 0)

    @property
    def failures(self) -> tuple[type[Exception], ...]:
        return (self._wandb.errors.Error, OSError)

    def log(self, row: Mapping[str, Any]) -> None:
        if (kind := _kind(row)) is None or row["step"] <= self._told.get(kind, -1):
            return
        watched = {} if self._watched is None or kind != "loss" else self._watched.histograms(row["step"])
        shapes = {name: self._wandb.Histogram(np_histogram=counted) for name, counted in watched.items()}
        try:
            self._run.log({**tagged(row), **shapes, "step": row["step"]})
        except self.failures:
            self._unwatch()
            self._keep(closed=True)
            raise
        self._told[kind] = row["step"]

    def finish(self, output_dir: Path, results: Mapping[str, Any]) -> None:
        self._run.summary.update({f"results/{name}": value for name, value in results.items() if value is not None})
        if not self._log_model:
            return
        model = self._wandb.Artifact(name=f"model-{self._id}", type="model", metadata=dict(results))
        for name in (WEIGHTS, METRICS):
            model.add_file(str(output_dir / name))
        described = read_json(output_dir / CONFIG)
        described["base_model_name_or_path"] = by_name(described["base_model_name_or_path"])
        with model.new_file(CONFIG, mode="w") as file:
            json.dump(described, file, indent=2)
        self._run.log_artifact(model)

    def close(self, *, well: bool) -> None:
        self._unwatch()
        self._keep(closed=True)
        self._run.finish(exit_code=0 if well else 1)

    def _unwatch(self) -> None:
        if self._watched is not None:
            self._watched.close()
            self._watched = None

    def _keep(self, *, closed: bool) -> None:
        held = {"id": self._id, "told": self._told, "closed": closed}
        write_atomically(self._file, (json.dumps(held) + "\n").encode())


class _Watched:
    """Histograms of what is trained, as wandb.watch makes them, but in the loop: that one sends from hooks inside the
    backward pass, where a lost connection ends the run (seen with wandb 0.31)."""

    def __init__(self, model: nn.Module, which: str, logging_steps: int, step: int) -> None:
        """which: gradients, parameters or all. step: the last one that was made."""
        self._made, self._which, self._every = step, which, max(_WATCHED_EVERY, logging_steps)
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._gradients: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        if which != "parameters":
            for name, parameter in self._trained.items():
                hook = parameter.register_post_accumulate_grad_hook(functools.partial(self._see, name))
                self._hooks.append(hook)

    def _is_due(self, step: int) -> bool:
        return step == 1 or step % self._every == 0

    def _see(self, name: str, parameter: Tensor) -> None:
        """Keeps a gradient of a step that is due, which is summed up and clipped in place, until its row is logged."""
        if parameter.grad is not None and self._is_due(self._made + 1):
            self._gradients[name] = parameter.grad

    def histograms(self, step: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """{"gradients/NAME": (counts, edges)} at every so many steps, not of those made before; of gradients as the
        update took them."""
        if step <= self._made:
            return {}
        self._made = step
        gradients, self._gradients = self._gradients, {}
        if not self._is_due(step):
            return {}
        parameters: Mapping[str, Tensor] = {} if self._which == "gradients" else self._trained
        kinds = {"gradients": gradients, "parameters": parameters}
        return {f"{kind}/{name}": _counted(value) for kind, found in kinds.items() for name, value in found.items()}


    def close(self) -> None:
        """Look at no gradient any more."""
        for hook in self._hooks:
            hook.remove()
        self._gradients = {}


def _counted(values: Tensor) -> tuple[np.ndarray, np.ndarray]:
    flat = values.detach().float().flatten()
    counts, edges = np.histogram(flat[flat.isfinite()].cpu().numpy(), bins=64)
    return counts, edges


def _kind(row: Mapping[str, Any]) -> str | None:
    """What a row is of: a step, or one of the measurements that may follow it."""
    return next((name for name in ("loss", "eval_loss", "mmlu_loss") if name in row), None)


def _kept(output_dir: Path) -> tuple[str, dict[str, int]]:
    """The id of wandb's run, and the last step that it was told of each kind of row. Where the run was killed, what is
    in the log that it left was told: a row is written there first."""
    path = output_dir / WANDB_RUN
    if not path.exists():
        return os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4), {}
    held = read_json(path)
    if not isinstance(held.get("id"), str) or not isinstance(held.get("told"), dict):
        raise InputError(f"{path} has no id of a run: remove it, and the run is a new one to wandb")
    told = dict(held["told"])
    logs = [log for log in (output_dir / f"{METRICS}.part", output_dir / METRICS) if log.exists()]
    if held.get("closed") or not logs:
        return held["id"], told
    for line in logs[0].read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):  # the last one may be cut
            row = json.loads(line)
            if (kind := _kind(row)) is not None:
                told[kind] = max(told.get(kind, -1), row["step"])
    return held["id"], told
