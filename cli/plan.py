"""`jindo-core plan`: what a training step will take, and what to change so that it fits."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import typing
from collections.abc import Iterator
from typing import Any

from jindo_core.cli.flags import parse_flags
from jindo_core.config import TrainConfig, settle
from jindo_core.errors import InputError, nearest
from jindo_core.settings import setting, show

_DESCRIPTION = """\
Work out a training step's memory on a GPU from the model's sizes alone: every component, the peak, what
lies on the host. With --max_memory_MB: whether it fits, and if not, the cheapest changes that make it fit.
It takes train's whole command line and config file; what a step's memory does not depend on is ignored."""

_EPILOG = """\
exit codes: 0 it fits, as given or with the changes named; 1 nothing makes it fit; 2 wrong input.

example:
  jindo-core plan --shape llama2-7b --lora_target_modules all-linear --cutoff_len 512 --micro_batch_size 1 \\
      --max_memory_MB 5400"""

_NEEDED = (
    "base_model", "cutoff_len", "micro_batch_size", "batch_size", "lora_r", "lora_dropout", "lora_target_modules",
    "optim", "quantize", "double_quant", "dtype", "max_memory_MB", "gradient_checkpointing", "checkpointed_layers",
    "offload_checkpoints", "offload_embedding", "offload_head", "offload_layers", "resident_optimizer_MB", "fsdp",
)  # fmt: skip
"""train's own settings that a step's memory depends on."""


def _config_class() -> Any:
    hints = typing.get_type_hints(TrainConfig)
    fields: list[Any] = []
    for field in dataclasses.fields(TrainConfig):
        if field.name == "json":  # a plan's is its own
            continue
        metadata = {**field.metadata, "hidden": field.name not in _NEEDED}
        if field.name == "base_model":
            metadata["help"] = "the model: folder, .gguf file or Hub id; only its sizes are read"
        fields.append((field.name, hints[field.name], dataclasses.field(default=field.default, metadata=metadata)))
    what = "in place of a model, its size: llama2-7b, llama3-8b, …"
    shape = setting(None, "model and files", what, metavar="NAME")
    fields.insert(1, ("shape", str | None, shape))
    what = "how many train together (torchrun's --nproc-per-node); the plan is one's"
    fields.append(("processes", int, setting(1, "memory and device", what, at_least=1)))
    fields.append(("json", bool, setting(False, "output", "JSON for machines: every row in bytes")))
    return dataclasses.make_dataclass("PlanConfig", fields, frozen=True, kw_only=True)


def run(argv: list[str]) -> int:
    """Prints the plan; returns 0, or 1 where a budget is given and nothing makes it fit."""
    config_class = _config_class()
    given = parse_flags(config_class, argv, prog="jindo-core plan", description=_DESCRIPTION, epilog=_EPILOG)
    values, explicit, notices = settle(given, config_class, otherwise="alpaca")
    config = config_class(**values)
    targets_named = "lora_target_modules" in explicit
    for notice in notices:
        print(f"note: {notice}", file=sys.stderr)
    if (config.base_model is None) == (config.shape is None):
        got = "neither" if config.shape is None else "both"
        raise InputError(f"plan: got {got} of --base_model and --shape, expected one, such as --shape llama2-7b")

    from jindo_core.budget import fit
    from jindo_core.plan import as_json

    job = _job(config, targets_named)
    budget = config.max_memory_MB * 1_000_000 or None
    found, changes, fits = (job, [], True) if budget is None else fit(job, budget)
    if config.json:
        print(json.dumps(as_json(job, budget, found, changes), indent=1))
    else:
        _show(config, job, found, [f"{change.text}: {change.cost}" for change in changes], fits)
    return 0 if fits else 1


def _show(config: Any, job: Any, found: Any, changes: list[str], fits: bool) -> None:
    from rich.console import Console

    from jindo_core.plan import plan
    from jindo_core.progress import plan_table

    console = Console(highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    targets = ",".join(job.targets) if len(job.targets) < len(job.sizes.linears) else "every linear layer"
    size = f"{job.micro_batch} x {job.length} tokens, {job.accumulation} of them to a step"
    if job.processes > 1:
        size += f" of each of {job.processes} processes"
    say(f"{config.shape or config.base_model}: {size}; r {job.lora_r} on {targets}; {config.optim}")
    console.print(plan_table(plan(job), "CUDA context"))
    if not config.max_memory_MB:
        return
    total = plan(job).peak_bytes / 1e6
    if not changes and fits:
        say(f"fits: {total:,.0f} of {config.max_memory_MB:,} MB")
        return
    say(f"does not fit: {total:,.0f} of {config.max_memory_MB:,} MB")
    for change in changes:
        say(f"  - {change}")
    after = plan(found)
    said = "with these changes it fits" if fits else "even with all of these it does not"
    say(f"{said}: {after.peak_bytes / 1e6:,.0f} MB, and {after.host_bytes / 1e6:,.0f} MB on the host")
    if fits:
        say("train chooses them by itself; by hand: " + shlex.join(_flags(job, found)))


def _flags(before: Any, after: Any) -> Iterator[str]:
    """What `after` differs in from `before`, as train's flags."""
    layers = after.sizes.layers
    values = {
        "micro_batch_size": after.micro_batch, "checkpointed_layers": after.checkpointed_layers,
        "offload_layers": after.offload_layers,
        "resident_optimizer_MB": -(-(after.resident_states or 0) // 1_000_000),
    }  # fmt: skip
    changed = {
        "micro_batch_size": before.micro_batch != after.micro_batch,
        "checkpointed_layers": before.checkpointed_layers != after.checkpointed_layers,
        "offload_layers": before.offload_layers != after.offload_layers,
        "resident_optimizer_MB": before.resident_states != after.resident_states,
    }
    if changed["checkpointed_layers"] and after.checkpointed_layers == layers:
        changed["checkpointed_layers"] = False
        yield "--gradient_checkpointing"
    for name in ("offload_checkpoints", "offload_embedding", "offload_head"):
        if getattr(after, name) != getattr(before, name):
            yield f"--{name}"
    for name, value in values.items():
        if changed[name]:
            yield from (f"--{name}", str(value))


def _sizes(base_model: str) -> Any:
    """Of a model, whose weights need not be there beside its config.json; where they are, they are looked at."""
    from jindo_core.architectures import read_config
    from jindo_core.files import read_json
    from jindo_core.formats import open_checkpoint
    from jindo_core.formats.bitsandbytes import check_quantization
    from jindo_core.hub import OLDER_FILES, holds_model, resolve_model
    from jindo_core.memory import sizes_of

    path = resolve_model(base_model)
    weights = any(True for pattern in ("*.safetensors", *OLDER_FILES) for _ in path.glob(pattern))
    if weights or not holds_model(path):
        return sizes_of(open_checkpoint(path).config)
    raw = read_json(path / "config.json")
    check_quantization(raw, path / "config.json")
    return sizes_of(read_config(raw))


def _job(config: Any, targets_named: bool) -> Any:
    if config.fsdp and config.processes == 1:
        raise InputError("--fsdp: got it in one process, expected several: --processes N, those that share the layers")
    if config.fsdp and config.offload_layers:
        raise InputError("--offload_layers: got it beside --fsdp, expected one of them: layers lie in shards then")
    names = {field.name for field in dataclasses.fields(TrainConfig)} - {"json"}
    train = TrainConfig(**{name: value for name, value in dataclasses.asdict(config).items() if name in names})
    from jindo_core.memory import job_of, usual_targets
    from jindo_core.plan import CONTEXT, SHAPES

    if config.shape is None:
        sizes = _sizes(config.base_model)
    else:
        name = config.shape.lower()
        name = next((known for known in (name, *(f"llama{n}-{name}" for n in ("", 2, 3))) if known in SHAPES), name)
        if name not in SHAPES:
            known = ", ".join(SHAPES)
            raise InputError(f"--shape: got {config.shape!r}, expected one of {known}.{nearest(name, SHAPES)}")
        sizes = SHAPES[name]
    train, linears = usual_targets(train, targets_named, sizes), tuple(sizes.linears)
    unknown = [n for n in train.lora_target_modules if n != "all-linear" and n.rpartition(".")[2] not in linears]
    if unknown:
        raise InputError(
            f"--lora_target_modules: got {show(tuple(unknown))}, expected some of {', '.join(linears)}, or all-linear."
            f"{nearest(unknown[0], [*linears, 'all-linear'])}"
        )
    return job_of(
        train, sizes, length=config.cutoff_len, itemsize=4 if config.dtype == "fp32" else 2, context=CONTEXT,
        processes=config.processes,
    )  # fmt: skip
