"""A training run before its first step: everything is read and checked, cheap checks first, the model last."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jindo_core import embedded
from jindo_core.budget import fit
from jindo_core.causal_lm import CausalLM, ModelConfig
from jindo_core.compiled import check_compile, compile_layers
from jindo_core.config import TrainConfig
from jindo_core.data.examples import PROMPTS_TOO, Encoder, prompt_ids
from jindo_core.data.packing import PackedRows
from jindo_core.data.records import Record
from jindo_core.data.store import Selection
from jindo_core.data.templates import NONE, Template, load_template
from jindo_core.errors import InputError, nearest
from jindo_core.formats import open_checkpoint
from jindo_core.hub import resolve_model
from jindo_core.loader import load_model, pick_device, pick_dtype
from jindo_core.lora import attach_lora
from jindo_core.memory import (
    CPU_PRODUCTS,
    CUDA_CONTEXT,
    Relief,
    current_bytes,
    job_of,
    keep_budget,
    sizes_of,
    usual_targets,
    within_budget,
)
from jindo_core.mmlu import Mmlu, load_mmlu
from jindo_core.optim import build_optimizer
from jindo_core.pages import PageStore, available_ram
from jindo_core.parallel import ALONE, Ranks
from jindo_core.plan import Job as Step
from jindo_core.plan import Plan, Sizes, plan
from jindo_core.plan_falcon import FalconSizes
from jindo_core.progress import loading_bar
from jindo_core.recompute import CheckpointOffload
from jindo_core.tokenizer import Tokenizer, load_tokenizer
from jindo_core.training_data import DataFile, TrainingData, open_files, read_data, show_rows
from jindo_core.training_view import TrainingView

ANSWER_TOKENS = 64
"""Tokens of the sample answers, before and after training."""


@dataclass(frozen=True)
class TrainingJob:
    """A run's parts once everything was read and checked.

    Attributes:
        given: the settings as they came. config: those, with what the model and a memory budget made necessary.
        step: a training step, as its memory was planned.
        probe: the row that is answered before and after, or None. mmlu: asked at every measuring, or None.
        ranks: the processes that do it together.
    """

    given: TrainConfig
    config: TrainConfig
    model: CausalLM
    optimizer: torch.optim.Optimizer
    relief: Relief
    tokenizer: Tokenizer
    template: Template
    data: TrainingData
    step: Step
    probe: Record | None
    mmlu: Mmlu | None = None
    ranks: Ranks = ALONE

    @property
    def examples(self) -> Selection | PackedRows:
        """What is trained on."""
        return self.data.examples

    @property
    def held_out(self) -> Selection:
        """What it is measured on."""
        return self.data.held_out


@dataclass(frozen=True)
class Settled:
    """What the memory budget of a run that goes on has made of its settings.

    Attributes:
        settings: by name. whole: nothing is left to plan; else --max_memory_MB is another one now, and the rest is
            planned anew, so far as no bit changes.
    """

    settings: Mapping[str, Any]
    whole: bool


@dataclass(frozen=True)
class _Sources:
    """What a run reads from, once it is known to be there. path: the base model's. capacity: a sequence's tokens."""

    config: TrainConfig
    path: Path
    architecture: ModelConfig
    tokenizer: Tokenizer
    template: Template
    encoder: Encoder
    files: list[DataFile]
    capacity: int


def prepare(
    config: TrainConfig, explicit: frozenset[str], view: TrainingView, planned: Settled | None = None,
    ranks: Ranks = ALONE,
) -> TrainingJob:
    """Read and check everything.

    Args:
        explicit: names of the settings that the user gave.
        planned: of the run that goes on.
    Raises:
        InputError: a path, file, row or setting that can't be used; nothing was written.
    """
    given = config
    with ranks.in_turn():
        found = _open(config, explicit, view)
        context, config = found.architecture.context, found.config
        mmlu = _questions(config, found.tokenizer, context, view) if config.do_mmlu_eval else None
        data = read_data(found.files, config, found.encoder, found.capacity, view)
    if planned is not None:
        config = dataclasses.replace(config, **planned.settings)
    config, step = _plan(config, found.architecture, data, view, ranks, planned)
    model = _load(found.path, config, view, ranks)
    trained = [p for p in model.parameters() if p.requires_grad]
    view.loaded(
        rows=data.rows, held_out=data.asked, trainable=sum(p.numel() for p in trained),
        dtype=str(model.dtype).removeprefix("torch."), device=str(model.device),
    )  # fmt: skip
    resident = config.resident_optimizer_MB
    optimizer = build_optimizer(
        config.optim, trained, lr=config.learning_rate, weight_decay=config.weight_decay,
        resident_bytes="auto" if resident is None else resident * 1_000_000, store=_place(config),
    )  # fmt: skip
    if config.compile:
        compile_layers(model)
        view.say("layers are compiled in the first steps, which takes a minute; the memory plan does not count it")
    relief = Relief(model, optimizer, config.micro_batch_size, _place(config), _advice(step), ranks)
    tokenizer, template = found.tokenizer, found.template
    probe = _choose_probe(data.probes, tokenizer, template, found.capacity, context)
    return TrainingJob(given, config, model, optimizer, relief, tokenizer, template, data, step, probe, mmlu, ranks)


def preview(config: TrainConfig, explicit: frozenset[str], view: TrainingView) -> None:
    """Show the first `config.preview` rows as they would be learnt; the model itself is not loaded.

    Raises:
        InputError: as `prepare`, of what is read for it.
    """
    found = _open(config, explicit, view)
    show_rows(found.files, found.config, found.encoder, found.tokenizer, view.console)


def _open(config: TrainConfig, explicit: frozenset[str], view: TrainingView) -> _Sources:
    """All but the rows and the model's weights."""
    pick_device(config.device)  # one that is not there is an error now
    check_compile(config)
    if config.base_model is None:
        view.say(f"Base model: {embedded.NAME}, embedded default (135M weights; it was made for English)")
    if config.data_path is None:
        view.notice("no --data_path: the bundled Korean instructions are used")
    files = open_files(config)
    config = _as_it_runs(config, files, explicit, view)
    if config.offload_folder is not None:
        PageStore(config.offload_folder).close()  # one that can't be written to is an error now
    path = resolve_model(config.base_model)
    tokenizer = load_tokenizer(path)
    template = load_template(config.prompt_template_name, tokenizer)
    architecture = open_checkpoint(path).config
    tokenizer.check(architecture.vocab_size)
    given = config.lora_target_modules
    config = usual_targets(config, "lora_target_modules" in explicit, sizes_of(architecture))
    if config.lora_target_modules != given:
        adapted = ", ".join(config.lora_target_modules)
        view.notice(f"this model has no {', '.join(given)}: {adapted} is adapted, or what --lora_target_modules names")
    _check_targets(config, sizes_of(architecture))
    config, capacity = _within_context(config, architecture, view)
    encoder = Encoder(
        tokenizer, template, cutoff_len=config.cutoff_len, train_on_inputs=config.train_on_inputs,
        source_max_len=config.source_max_len, target_max_len=config.target_max_len,
    )  # fmt: skip
    return _Sources(config, path, architecture, tokenizer, template, encoder, files, capacity)


def _as_it_runs(
    config: TrainConfig, files: Sequence[DataFile], explicit: frozenset[str], view: TrainingView
) -> TrainConfig:
    """The settings as they take effect, and said where that is not what a person may expect."""
    if config.train_on_inputs and "train_on_inputs" not in explicit:
        view.notice(PROMPTS_TOO)
    rows = config.accumulation_steps * config.micro_batch_size
    if rows != config.batch_size:
        given = f"--batch_size {config.batch_size} is no multiple of --micro_batch_size {config.micro_batch_size}"
        view.notice(f"{given}: {rows} rows a step")
        config = dataclasses.replace(config, batch_size=rows)
    if all(file.formatted for file in files):
        if "prompt_template_name" in explicit and config.prompt_template_name != NONE:
            view.notice("--prompt_template_name has no effect: the rows bring their own prompt, as template none does")
        config = dataclasses.replace(config, prompt_template_name=NONE)
    return config


def _check_targets(config: TrainConfig, sizes: Sizes | FalconSizes) -> None:
    """Names that no layer has are an error before anything is tokenized or loaded, as `attach_lora` has it."""
    names, known = config.lora_target_modules, tuple(sizes.linears)
    if names != ("all-linear",) and not any(name.rpartition(".")[2] in known for name in names):
        raise InputError(
            f"lora_target_modules [{', '.join(names)}] match no linear layer; this model has "
            f"[{', '.join(sorted(known))}].{nearest(names[0], [*known, 'all-linear'])}"
        )


def _within_context(config: TrainConfig, architecture: ModelConfig, view: TrainingView) -> tuple[TrainConfig, int]:
    """The settings with no row longer than the model reads, and the most tokens of a sequence."""
    context, source, target = architecture.context, config.source_max_len, config.target_max_len
    if config.packing and architecture.memory is not None:
        raise InputError(
            "--packing: got it with a LongLLaMA, which reads its input in windows and remembers what came before; "
            "expected one row to a sequence: leave --packing out"
        )
    if source is None or target is None:
        if context is not None and config.cutoff_len > context:
            view.notice(f"cutoff_len {config.cutoff_len} is beyond the model's context: {context} is used")
            config = dataclasses.replace(config, cutoff_len=context)
        return config, config.cutoff_len
    if context is not None and source + target > context:
        given = f"source_max_len {source} and target_max_len {target}"
        # The longer one gives way, until both are as long.
        target = max(min(target, context // 2), context - source)
        source = context - target
        view.notice(f"{given} are beyond the model's context of {context}: {source} and {target} are used")
        config = dataclasses.replace(config, source_max_len=source, target_max_len=target)
    return config, source + target


# --- memory -----------------------------------------------------------------------------------------------


def _plan(
    config: TrainConfig, architecture: ModelConfig, data: TrainingData, view: TrainingView, ranks: Ranks,
    planned: Settled | None,
) -> tuple[TrainConfig, Step]:
    """What the budget makes necessary, unless it was settled before, the same on all ranks; shows the memory plan."""
    device = pick_device(config.device)
    cuda = device.type == "cuda"
    itemsize = pick_dtype(config.dtype, device).itemsize
    length = -(-data.longest // 8) * 8
    process = CUDA_CONTEXT if cuda else ranks.worst(current_bytes(device)) + CPU_PRODUCTS
    wanted = dataclasses.replace(
        job_of(
            config, sizes_of(architecture), length=length, itemsize=itemsize, context=process, processes=ranks.size
        ),
        micro_batch=min(config.micro_batch_size, len(data.examples)), on_cuda=cuda,
    )  # fmt: skip
    _say_what_is_idle(config, wanted, view)
    settled = planned is not None and planned.whole
    config, step, changes = (
        (config, wanted, []) if settled else within_budget(config, wanted, exact=planned is not None)
    )
    for change in changes:
        view.notice(f"to keep within {config.max_memory_MB} MB: {change.text} ({change.cost})")
    found = plan(step)
    view.plan(found, "CUDA context" if cuda else "Python and its libraries")
    if not cuda:
        view.say("on a CPU the plan is a guide: a run may take twice as much")
    _check_host(config, found, cuda, ranks.beside)
    keep_budget(device, config.max_memory_MB)
    return config, step


def _say_what_is_idle(config: TrainConfig, step: Step, view: TrainingView) -> None:
    """Settings that have no effect beside the others."""
    if config.offload_checkpoints and not step.checkpoints and not config.max_memory_MB:
        view.notice("--offload_checkpoints has no effect: no layer is checkpointed (--gradient_checkpointing)")
    if config.gradient_checkpointing and config.checkpointed_layers:
        given = f"--checkpointed_layers {config.checkpointed_layers}"
        view.notice(f"{given} has no effect: all are (--gradient_checkpointing)")
    if config.offload_embedding and step.sizes.tied and not config.offload_head:
        view.notice("--offload_embedding has no effect: this model's embedding is its head (--offload_head moves both)")


def _check_host(config: TrainConfig, found: Plan, cuda: bool, processes: int) -> None:
    """Room for what all `processes` of this machine offload, before anything is loaded."""
    needed, place = found.host_bytes * processes, config.offload_folder
    if place is not None:
        needed -= found.elsewhere["offloaded_embedding"] * processes  # that one lies in RAM
        free = shutil.disk_usage(place).free
        if needed > free:
            raise InputError(
                f"--offload_folder {place}: {needed / 1e6:,.0f} MB are to lie there, {free / 1e6:,.0f} MB are free: "
                "give another folder, or offload less"
            )
    elif cuda and (ram := available_ram()) is not None and needed > ram:
        raise InputError(
            f"{needed / 1e6:,.0f} MB are to lie in RAM, {ram / 1e6:,.0f} MB are free: give --offload_folder a folder "
            "on a disk, or offload less"
        )


def _advice(step: Step) -> str:
    """The planner's account of the smallest step of this length."""
    least, _, _ = fit(step, 0)
    found = plan(least)
    rows = sorted(found.rows.items(), key=lambda item: -item[1])[:3]
    most = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in rows)
    total = f"{found.peak_bytes / 1e6:,.0f} MB at {least.length} tokens"
    return f" (planned: {total}, most of it {most}; see jindo-core plan)"


# --- model and rows ----------------------------------------------------------------------------------


def _load(path: Path, config: TrainConfig, view: TrainingView, ranks: Ranks) -> CausalLM:
    """The model with its adapter attached, as the settings say what is kept where."""
    torch.manual_seed(config.seed)
    with loading_bar(view.console, shown=view.draws) as on_progress:
        model = load_model(
            path, quantize=config.quantize, double_quant=config.double_quant, dtype=config.dtype, device=config.device,
            offload_layers=config.offload_layers, offload_embedding=config.offload_embedding,
            offload_head=config.offload_head, offload_folder=_place(config), on_progress=on_progress,
            ranks=ranks,
        )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attach_lora(
            model,
            config.lora_r,
            config.lora_alpha,
            config.lora_dropout,
            config.lora_target_modules,
            use_rslora=config.use_rslora,
        )
    for message in caught:
        view.notice(str(message.message))
    ranks.shard_root(model.stack)
    ranks.same_adapter(model)
    ranks.diverge(config.seed)
    stack = model.stack
    stack.checkpointed_layers = len(stack.layers) if config.gradient_checkpointing else config.checkpointed_layers
    if config.offload_checkpoints:
        stack.checkpoint_offload = CheckpointOffload(_place(config))
    return model


def _place(config: TrainConfig) -> str:
    return config.offload_folder or "host"


def _questions(config: TrainConfig, tokenizer: Tokenizer, context: int | None, view: TrainingView) -> Mmlu:
    mmlu = load_mmlu(
        config.mmlu_path, tokenizer, dataset=config.mmlu_dataset, split=config.mmlu_split,
        max_samples=config.max_mmlu_samples, source_max_len=config.mmlu_source_max_len, context=context,
    )  # fmt: skip
    count = len(mmlu.questions)
    often = "after each epoch" if config.eval_epochs else f"every {config.eval_steps} steps"
    view.say(f"MMLU: {count} questions, asked before training, {often} and at the end")
    if mmlu.cut:
        view.notice(f"{mmlu.cut} of them are too long and lose their beginning: --mmlu_source_max_len")
    return mmlu


def _choose_probe(
    records: Sequence[Record], tokenizer: Tokenizer, template: Template, cutoff: int, context: int | None
) -> Record | None:
    """The first row whose prompt is no longer than what is trained on, and leaves room for an answer within the model's
    context; None if there is none."""
    for record in records[:100]:
        prompt = len(prompt_ids(tokenizer, template, record))
        if 0 < prompt <= cutoff and (context is None or prompt + ANSWER_TOKENS <= context):
            return record
    return None
