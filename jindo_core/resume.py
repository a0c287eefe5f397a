"""Taking a run up again: what a checkpoint holds of it, where it is found, and what must be the same to go on."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jindo_core import checkpoint, optim
from jindo_core.adamw_state import Moments
from jindo_core.adapters import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    adapter_config,
    adapter_state,
    read_adapter,
    restore_adapter,
)
from jindo_core.causal_lm import CausalLM
from jindo_core.checkpoint import STATE, Checkpoint, Written
from jindo_core.config import TrainConfig
from jindo_core.data.batches import BatchCursor
from jindo_core.errors import InputError
from jindo_core.formats.checksums import checksum
from jindo_core.formats.places import Place
from jindo_core.formats.safetensors_file import read_header
from jindo_core.formats.safetensors_writer import SafetensorsWriter
from jindo_core.head import StreamedHead
from jindo_core.lora import adapted_layers
from jindo_core.memory import BUDGETED
from jindo_core.nf4 import CONSTANTS
from jindo_core.parallel import is_sharded, whole
from jindo_core.prepare import Settled, TrainingJob
from jindo_core.run_record import FILE as RUN
from jindo_core.run_record import RunRecord, record_bytes
from jindo_core.run_state import RunState, random_states, set_random_states
from jindo_core.settings import show
from jindo_core.training_view import TrainingView

OPTIMIZER = "optimizer.safetensors"
_FILES = {WEIGHTS, CONFIG, OPTIMIZER, STATE}

FIXED = (
    "lora_r", "lora_alpha", "lora_target_modules", "use_rslora", "quantize", "double_quant", "dtype", "optim",
    "batch_size", "micro_batch_size", "seed", "packing", "group_by_length", "data_weights", "val_set_size",
    "max_train_samples", "cutoff_len", "source_max_len", "target_max_len", "train_on_inputs",
)  # fmt: skip
"""Settings that a run can't go on without, or only as another run."""

FOLLOWED = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "num_epochs", "max_steps", "weight_decay",
    "max_grad_norm", "lora_dropout", "offload_head", "compile",
)  # fmt: skip
"""Settings that may change on the way; the run then ends otherwise than it would have, which is said."""


@dataclass(frozen=True)
class Foreign:
    """A checkpoint of peft or transformers' Trainer, of which the adapter's weights are taken."""

    folder: Path


# --- finding --------------------------------------------------------------------------------------------


def find(config: TrainConfig, output_dir: Path, view: TrainingView) -> Checkpoint | Foreign | None:
    """What the settings say to go on from; None: nothing, or nothing is there yet.

    Raises:
        InputError: the one that is named can't be used, or of those that are there none can.
    """
    named = config.resume_from_checkpoint
    if named is not None and named != "True":
        folder = Path(named).expanduser()
        if not folder.is_dir():
            raise InputError(f"--resume_from_checkpoint: {folder} is no folder: expected a checkpoint's")
        return _checked(folder) if checkpoint.is_ours(folder) else _foreign(folder)
    if named is None and not config.resume:
        return None
    found, faults = checkpoint.newest(output_dir)
    for fault in faults:
        view.notice(f"passed over: {fault}")
    if found is not None:
        return _checked(found.folder, found)
    if faults:
        raise InputError(
            f"{output_dir} has no checkpoint that is whole ({faults[0]}): copy one back, or start afresh with "
            "--overwrite_output_dir and without --resume"
        )
    if others := checkpoint.folders(output_dir):
        return _foreign(others[-1])
    if named is not None:
        raise InputError(f"--resume_from_checkpoint: {output_dir} has no checkpoint: --resume starts afresh then")
    view.say(f"No checkpoint in {output_dir} yet: the run starts afresh")
    return None


def _checked(folder: Path, found: Checkpoint | None = None) -> Checkpoint:
    found = found or checkpoint.read(folder)
    if lacks := _FILES - found.files:
        raise InputError(f"{folder} has no {sorted(lacks)[0]}: a run never goes on without a part of its state")
    return found


def _foreign(folder: Path) -> Foreign:
    if not any((folder / name).exists() for name in (WEIGHTS, "adapter_model.bin")):
        raise InputError(f"{folder} holds neither a checkpoint of ours nor {WEIGHTS}: expected one of them")
    return Foreign(folder)


def check_settings(found: Checkpoint, config: TrainConfig, view: TrainingView) -> Settled:
    """See that a run with these settings can go on from a checkpoint; says what will be otherwise than it would.

    Returns:
        What the memory budget had made of the settings, for `prepare`.
    Raises:
        InputError: it can't; names the setting.
    """
    before, now = found.state["given"], _plain(config)
    for name in FIXED:
        if name in before and before[name] != now[name]:
            raise InputError(
                f"--{name}: got {_shown(now[name])}, and {found.folder.name} was made with {_shown(before[name])}: "
                "give that again, or begin anew in another --output_dir"
            )
    for name in FOLLOWED:
        if name in before and before[name] != now[name]:
            view.notice(
                f"--{name} is {_shown(now[name])}, it was {_shown(before[name])}: the run won't end as it would have"
            )
    kept: tuple[str, ...] = ("micro_batch_size", "batch_size")
    budgets = [before.get("max_memory_MB", 0), config.max_memory_MB]
    same = budgets[0] == budgets[1]
    if config.max_memory_MB and same:
        kept += BUDGETED
    elif not same:
        shown = [f"{budget:,} MB" if budget else "none" for budget in budgets]
        view.notice(
            f"--max_memory_MB is {shown[1]}, it was {shown[0]}: what lies where is planned anew, and no bit of the "
            "result changes by that"
        )
        if before["offload_head"] == now["offload_head"]:  # else it was asked for, and said above
            kept += ("offload_head",)
    return Settled({name: found.state["config"][name] for name in kept}, whole=same)


def _plain(config: TrainConfig) -> dict[str, Any]:
    """As JSON gives it back."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}


def _shown(value: Any) -> str:
    return show(tuple(value)) if isinstance(value, list) else show(value)


# --- saving ---------------------------------------------------------------------------------------------


def base_digest(model: CausalLM) -> str:
    """SHA-256 over the frozen weights' checksums, NF4's codes and constants among them, wherever each lies."""
    whole = hashlib.sha256()
    for name, value in sorted(_frozen(model)):
        whole.update(f"{name} {value}\n".encode())
    return whole.hexdigest()


def _frozen(model: CausalLM) -> Iterator[tuple[str, str]]:
    """(name, checksum) of what is not trained."""
    stack = model.stack
    layers: dict[nn.Module, int] = {layer: number for number, layer in enumerate(stack.layers)}
    inside = {module for layer in layers for module in layer.modules()}
    for path, module in model.named_modules():
        if module in layers:
            held = contextlib.nullcontext() if stack.stream is None else stack.stream.use(layers[module])
            with held, whole(module):
                for name, part in module.named_modules(prefix=path):
                    yield from _own(name, part, copied=is_sharded(module))
        elif module not in inside:
            yield from _own(path, module)


def _own(path: str, module: nn.Module, *, copied: bool = False) -> Iterator[tuple[str, str]]:
    if isinstance(module, StreamedHead):
        yield f"{path}.weight", checksum(module.whole())
        return
    held = itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    for name, value in held:
        if not value.requires_grad and (isinstance(value, nn.Parameter) or name in CONSTANTS):
            yield f"{path}.{name} {value.dtype} {tuple(value.shape)}", checksum(value.clone() if copied else value)


def surroundings(device: torch.device, ranks: int = 1) -> dict[str, Any]:
    """What rounding may depend on besides the run's settings. ranks: how many processes train."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    threads = torch.get_num_threads()
    return {"torch": torch.__version__, "threads": threads, "device": f"{device.type} ({kind})", "processes": ranks}


class Saver:
    """Writes a run's checkpoints.

    Args:
        base: digest of the model's frozen weights. base_model: what the adapter's config calls it.
        record: of the run, so that `generate` needs no more than a checkpoint's folder.
    """

    def __init__(
        self, job: TrainingJob, cursor: BatchCursor, output_dir: Path, base: str, base_model: str, record: RunRecord
    ) -> None:
        self._job, self._cursor, self._output_dir = job, cursor, output_dir
        self._base, self._base_model, self._record = base, base_model, record

    def save(self, state: RunState) -> Path:
        """checkpoint-STEP of the run as it stands between two steps. All ranks call it, the first one writes.

        Raises:
            OSError, InputError: it can't be written; the older ones are as they were.
            TrainingError: the ranks' adapters differ.
        """
        ranks, adapter = self._job.ranks, adapter_state(self._job.model)
        if ranks.size > 1:  # or else checksums are work for nothing
            ranks.check_same({"the adapter's weights": [checksum(value) for value in adapter.values()]})
        random = ranks.gather(random_states(self._job.model.device))
        try:
            path = ranks.first(lambda: self._write(state, random, adapter))
        except (OSError, InputError):
            state.candidate = None  # what was measured is not kept, and an earlier best one is
            raise
        state.keep_candidate()
        return path

    def _write(self, state: RunState, random: list[dict[str, Any]], adapter: dict[str, Tensor]) -> Path:
        """random: of every rank."""
        job = self._job
        names, steps = _trained(job.model), optim.updates(job.optimizer)
        held = {
            "run": state.packed(),
            "cursor": self._cursor.state(),
            "random": random[0],
            "random_of_others": random[1:],
            "relief": job.relief.state(),
            "updates": {names[param]: step for param, step in steps.items()},
            "base": self._base,
            "data": job.data.chosen.digest(),
            "surroundings": surroundings(job.model.device, job.ranks.size),
            "given": _plain(job.given),
            "config": _plain(job.config),
        }
        moments = optim.moment_bytes(job.optimizer)
        values = {name: value.nbytes for name, value in adapter.items()}
        states = {f"{names[p]}.{part}": size for p, parts in moments.items() for part, size in parts.items()}

        def fill(folder: Path) -> Written:
            streamed = optim.stream_moments(job.optimizer)
            parts = ((f"{names[p]}.{name}", value) for p, found in streamed for name, value in found.items())
            return {
                **_write_tensors(folder, WEIGHTS, values, iter(adapter.items())),
                **_write_tensors(folder, OPTIMIZER, states, parts),
            }

        small = {
            CONFIG: adapter_config(job.model, self._base_model),
            RUN: record_bytes(self._record),
            STATE: (json.dumps(held, ensure_ascii=False) + "\n").encode(),
        }
        needs = sum(values.values()) + sum(states.values())
        path = checkpoint.write(self._output_dir, state.step, small, fill, tensor_bytes=needs)
        best = state.candidate or state.best
        spared = () if best is None else (best.step,)
        checkpoint.rotate(self._output_dir, job.config.save_total_limit, spared)
        return path


def _trained(model: CausalLM) -> dict[nn.Parameter, str]:
    """The names of what is trained, as the adapter's file has them."""
    return {
        parameter: f"{path}.{name}"
        for path, layer in adapted_layers(model)
        for name, parameter in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B))
    }


def _write_tensors(folder: Path, file: str, sizes: Mapping[str, int], tensors: Iterator[tuple[str, Tensor]]) -> Written:
    if not sizes:  # every step so far was skipped
        (folder / file).write_bytes((2).to_bytes(8, "little") + b"{}")
        return {}
    stem, whole = file.removesuffix(".safetensors"), sum(sizes.values())
    with SafetensorsWriter(folder, sizes, whole, checksums=True, stem=stem) as writer:
        for name, value in tensors:
            writer.write(name, value)
    return writer.written


# --- going on -------------------------------------------------------------------------------------------


def restore(
    job: TrainingJob, cursor: BatchCursor, found: Checkpoint, base: str, state: RunState, view: TrainingView
) -> None:
    """Put a run where it was when the checkpoint was written.

    Args:
        base: digest of this run's frozen weights. state: a new one, which is filled.
    Raises:
        InputError: the model or the rows are others than they were, or a file became unreadable.
    """
    held, name = found.state, found.folder.name
    if held["base"] != base:
        threads = held["surroundings"]["threads"]
        more = "" if threads == torch.get_num_threads() else f", or its {threads} threads when it was quantized"
        raise InputError(f"the base model's weights are others than those {name} was made with: give that model{more}")
    if held["data"] != job.data.chosen.digest():
        raise InputError(f"the rows are others than those {name} was made with: give the same data and template")
    cursor.load(held["cursor"])
    restore_adapter(job.model, _read_tensors(found.folder / WEIGHTS), found.folder)
    _restore_moments(job, held["updates"], found.folder / OPTIMIZER)
    job.relief.load(held["relief"])
    state.load(held["run"])
    now = surroundings(job.model.device, job.ranks.size)
    for what, before in held["surroundings"].items():
        if before != now[what]:
            draws = " and dropout is drawn otherwise" if what == "processes" and job.config.lora_dropout else ""
            view.notice(f"{name} was made with {what} {before}, this run has {now[what]}: rounding may differ{draws}")
    random = [held["random"], *held.get("random_of_others", [])][job.ranks.rank :]
    if not random:  # fewer ranks than now wrote it
        job.ranks.diverge(job.config.seed, state.step)
    elif not set_random_states(random[0], job.model.device):
        view.notice(f"{name} was made on another kind of device: dropout is drawn otherwise from here on")
    view.say(f"Going on after step {state.step}, from {found.folder}")


def _restore_moments(job: TrainingJob, steps: Mapping[str, int], file: Path) -> None:
    params = {name: parameter for parameter, name in _trained(job.model).items()}
    places = read_header(file).places
    owners: dict[str, dict[str, Place]] = {name: {} for name in steps}
    for key, place in places.items():
        name, _, part = key.rpartition(".")
        owners.setdefault(name, {})[part] = place
    if odd := owners.keys() ^ steps.keys() or owners.keys() - params.keys():
        raise InputError(f"{file} and {STATE} differ in {sorted(odd)[0]}: the checkpoint is damaged")
    moments = _Moments({params[name]: found for name, found in owners.items()})
    try:
        optim.load_moments(job.optimizer, {params[name]: step for name, step in steps.items()}, moments)
    except ValueError as error:
        raise InputError(f"{file}: {error}") from None


class _Moments(Mapping[nn.Parameter, Moments]):
    """Moments in a file, read as they are asked for."""

    def __init__(self, places: Mapping[nn.Parameter, Mapping[str, Place]]) -> None:
        self._places = places

    def __getitem__(self, param: nn.Parameter) -> Moments:
        return {name: place.read() for name, place in self._places[param].items()}

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    return {name: place.read() for name, place in read_header(file).places.items()}


def take_weights(job: TrainingJob, found: Foreign, view: TrainingView) -> None:
    """Begin with the adapter of another tool's checkpoint; optimizer, schedule and data begin anew, which is said.

    Raises:
        InputError: it is of another model, or of another shape than the settings say.
    """
    linears = {path: (m.out_features, m.in_features) for path, m in _linears(job.model)}
    adapter = read_adapter(found.folder, linears)
    ranks = {a.shape[0] for a, _ in adapter.pairs.values()}
    scales = {adapter.alpha / (rank**0.5 if adapter.use_rslora else rank) for rank in ranks}
    if scales != {layer.scale for _, layer in adapted_layers(job.model)}:
        config = job.config
        raise InputError(
            f"{found.folder} has r {max(ranks)} and lora_alpha {adapter.alpha:g}, this run --lora_r {config.lora_r} "
            f"and --lora_alpha {config.lora_alpha:g}: give the same"
        )
    halves = (("lora_A", 0), ("lora_B", 1))
    weights = {f"{PREFIX}{path}.{name}.weight": pair[i] for path, pair in adapter.pairs.items() for name, i in halves}
    restore_adapter(job.model, weights, found.folder)
    anew = "while optimizer, learning rate and data begin anew"
    view.notice(f"{found.folder} is of another tool: its adapter is taken up, {anew}")


def _linears(model: CausalLM) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that may carry an adapter, under their paths without one."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            yield path.removesuffix(".base"), module


def load_best(job: TrainingJob, folder: Path, view: TrainingView) -> bool:
    """Put the adapter of the checkpoint that was measured best into the model. False, and a notice: it is gone."""
    try:
        restore_adapter(job.model, _read_tensors(checkpoint.read(folder).folder / WEIGHTS), folder)
    except InputError as error:
        view.notice(f"the checkpoint that was measured best can't be taken ({error}): the last step's adapter is kept")
        return False
    return True
