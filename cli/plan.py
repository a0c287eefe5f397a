"""`jindo-core plan`: what a training step will take, and what to change so that it fits."""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any

from jindo_core.cli.flags import parse_flags
from jindo_core.config import TrainConfig
from jindo_core.errors import InputError, nearest
from jindo_core.settings import setting, show

_DESCRIPTION = """\
Work out a training step's memory on a GPU from the model's sizes alone: every component, the peak, what
lies on the host. With --max_memory_MB: whether it fits, and if not, the cheapest changes that make it fit."""

_SHARED = (
    "base_model", "cutoff_len", "micro_batch_size", "batch_size", "lora_r", "lora_dropout", "lora_target_modules",
    "optim", "quantize", "double_quant", "dtype", "max_memory_MB", "gradient_checkpointing", "checkpointed_layers",
    "offload_checkpoints", "offload_embedding", "offload_layers",
)  # fmt: skip
"""train's own settings that a step's memory depends on."""


def _config_class() -> Any:
    hints = typing.get_type_hints(TrainConfig)
    shared = {field.name: field for field in dataclasses.fields(TrainConfig)}
    fields: list[Any] = [
        (name, hints[name], dataclasses.field(default=shared[name].default, metadata=shared[name].metadata))
        for name in _SHARED
    ]
    what = "the model"
    shape = setting(None, what, "instead of a model: llama2-7b, llama3-8b, …", metavar="NAME")
    fields.insert(1, ("shape", str | None, shape))
    fields.append(("json", bool, setting(False, "output", "JSON for machines: every row in bytes")))
    return dataclasses.make_dataclass("PlanConfig", fields, frozen=True, kw_only=True)


def run(argv: list[str]) -> int:
    """Prints the plan; returns 0, or 1 where a budget is given and nothing makes it fit."""
    config_class = _config_class()
    given = parse_flags(config_class, argv, prog="jindo-core plan", description=_DESCRIPTION)
    config = config_class(**given)
    targets_named = "lora_target_modules" in given
    if "micro_batch_size" in given and "batch_size" not in given:
        config = dataclasses.replace(config, batch_size=max(config.batch_size, config.micro_batch_size))
    if (config.base_model is None) == (config.shape is None):
        got = "neither" if config.shape is None else "both"
        raise InputError(f"plan: got {got} of --base_model and --shape, expected one, such as --shape llama2-7b")

    from jindo_core.plan import Plan, as_json, fit, plan

    job = _job(config, targets_named)
    budget = config.max_memory_MB * 1_000_000 or None
    found, changes, fits = (job, [], True) if budget is None else fit(job, budget)
    if config.json:
        print(json.dumps(as_json(job, budget, found, changes), indent=1))
        return 0 if fits else 1
    from rich.console import Console

    from jindo_core.progress import plan_table

    console = Console(highlight=False)
    console.print(plan_table(plan(job), "CUDA context"))
    if budget is None:
        return 0
    total = plan(job).peak_bytes / 1e6
    if not changes and fits:
        console.print(f"fits: {total:,.0f} of {config.max_memory_MB:,} MB", markup=False)
        return 0
    console.print(f"does not fit: {total:,.0f} of {config.max_memory_MB:,} MB", markup=False)
    for change in changes:
        console.print(f"  - {change.text}: {change.cost}", markup=False)
    after: Plan = plan(found)
    said = "with these changes it fits" if fits else "even with all of these it does not"
    console.print(
        f"{said}: {after.peak_bytes / 1e6:,.0f} MB, and {after.host_bytes / 1e6:,.0f} MB on the host", markup=False
    )
    return 0 if fits else 1


def _job(config: Any, targets_named: bool) -> Any:
    names = tuple(f.name for f in dataclasses.fields(TrainConfig))
    given = {name: value for name, value in dataclasses.asdict(config).items() if name in names}
    train = TrainConfig(**given)
    from jindo_core.memory import job_of, usual_targets
    from jindo_core.plan import CONTEXT, SHAPES

    if config.shape is None:
        from jindo_core.formats import open_checkpoint
        from jindo_core.hub import resolve_model
        from jindo_core.memory import sizes_of

        sizes = sizes_of(open_checkpoint(resolve_model(config.base_model)).config)
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
            f"--lora_target_modules: got {show(tuple(unknown))}, expected some of {', '.join(linears)}, or all-linear"
        )
    return job_of(train, sizes, length=config.cutoff_len, itemsize=4 if config.dtype == "fp32" else 2, context=CONTEXT)
