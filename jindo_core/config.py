"""Every setting of `train` and `generate`: name, type, default, help and bounds, in one place.

The command line (`jindo_core.cli.flags`), config files and Python callers all meet here. A value is read by
its `Setting` (type, choices, bounds) when a config is made; what concerns several settings at once is checked
in `__post_init__`. Nothing heavy is imported, so that `--help` and a wrong value answer at once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jindo_core import qlora
from jindo_core.config_checks import check_together
from jindo_core.errors import InputError, nearest
from jindo_core.settings import Config, Setting, setting, settings

# Defaults that depend on the job. `alpaca` (a base model is named) is alpaca-lora's finetune.py; `embedded`
# (none is named) is the main job on SmolLM2-135M, sized to end within five minutes on two CPU cores; `qlora` (a
# model or data is given under qlora.py's names) is that program's.
PROFILES: dict[str, dict[str, Any]] = {
    "alpaca": {
        "output_dir": "./lora-alpaca",
        "batch_size": 128,
        "micro_batch_size": 4,
        "num_epochs": 3.0,
        "learning_rate": 3e-4,
        "lr_scheduler_type": "linear",
        "val_set_size": 2000,
        "lora_dropout": 0.05,
        "lora_target_modules": ("q_proj", "v_proj"),
        "train_on_inputs": True,
        "group_by_length": False,
        "prompt_template_name": "alpaca",
        "logging_steps": 10,
        "save_steps": 200,
        "save_total_limit": 3,
        "load_best_model_at_end": True,
    },
    "embedded": {
        "output_dir": "./lora-korean",
        "batch_size": 4,
        "micro_batch_size": 4,
        "num_epochs": 1.0,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "val_set_size": 32,
        "lora_dropout": 0.0,  # one pass over the rows: nothing to overfit, and a tenth of the time saved
        "lora_target_modules": ("all-linear",),
        "train_on_inputs": False,
        "group_by_length": True,
        "prompt_template_name": "korean_short",
        "logging_steps": 1,
        "save_steps": 200,
        "save_total_limit": 3,
        "load_best_model_at_end": True,
    },
    "qlora": qlora.PROFILE,
}

_FAMILIES = {"alpaca": ("base_model", "data_path"), "qlora": ("model_name_or_path", "dataset")}
"""The names that say whose command line this is."""

# What other trainers call a setting, where the spelling alone would suggest a wrong one (`lr` is closest to
# `lora_r`) or none at all.
_SAID_ELSEWHERE = {
    "base_model": "model model_name",
    "data_path": "data train_file",
    "output_dir": "output",
    "overwrite_output_dir": "overwrite",
    "learning_rate": "lr",
    "num_epochs": "epochs",
    "lr_scheduler_type": "scheduler",
    "cutoff_len": "max_seq_len max_seq_length max_length",
    "prompt_template_name": "template prompt_template",
    "lora_r": "r rank",
    "lora_alpha": "alpha",
    "lora_target_modules": "target_modules",
    "lora_weights": "adapter",
    "overwrite": "force overwrite_output_dir",
    "output_file": "outfile",
    "dtype": "outtype",
    "instruction": "prompt",
}

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


def _profiled(name: str, group: str, help: str, **more: Any) -> Any:
    """A setting whose default is the profile's; a config made without a profile takes alpaca-lora's."""
    return setting(PROFILES["alpaca"][name], group, help, **more)


_MODEL, _RUN, _DATA, _LORA = "model and files", "the run", "data and prompts", "LoRA"
_MEMORY, _LOGS, _SAMPLING, _MMLU = "memory and device", "logging and checkpoints", "sampling", "logging and checkpoints"
_DRAWN = ("temperature", "top_p", "top_k")
_SAMPLED = ("max_new_tokens", "do_sample", *_DRAWN)
_SEED_LIMIT = 2**32 - 1  # numpy's; torch would take more


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of `jindo-core train`. Raises InputError when a value is wrong.

    The defaults below are the `alpaca` profile's. `resolve_train_config` picks the profile that fits.
    """

    base_model: str | None = setting(
        None, _MODEL, "folder, .gguf or Hub id; else SmolLM2-135M", path=True, metavar="MODEL"
    )
    data_path: tuple[str, ...] | None = setting(
        None, _MODEL, "files, folders or Hub ids; else bundled rows", path=True, metavar="DATA..."
    )
    data_weights: tuple[float, ...] | None = setting(
        None, _MODEL, "how often an epoch sees each, say 1,0.5", above=0, metavar="X,X"
    )
    dataset_format: str | None = setting(None, _MODEL, "of the rows; left out: by their columns", metavar="NAME")
    profile: Literal["alpaca", "qlora", "embedded"] | None = setting(
        None, _MODEL, "defaults: alpaca, qlora, embedded; N: a profile", metavar="NAME|N"
    )
    output_dir: str = _profiled("output_dir", _MODEL, "for all output", path=True, metavar="DIR")
    overwrite_output_dir: bool = setting(False, _MODEL, "replace another run's output")

    batch_size: int = _profiled("batch_size", _RUN, "rows to one optimizer step", at_least=1)
    micro_batch_size: int = _profiled("micro_batch_size", _RUN, "rows on the device at once", at_least=1)
    num_epochs: float = _profiled("num_epochs", _RUN, "passes over the data", above=0)
    max_steps: int = setting(-1, _RUN, "stop after so many steps (-1: no limit)", at_least=-1)
    learning_rate: float = _profiled("learning_rate", _RUN, "highest learning rate", above=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = _profiled(
        "lr_scheduler_type", _RUN, "linear, cosine or constant", metavar="NAME"
    )
    warmup_steps: int = setting(100, _RUN, "warmup, at most a tenth of the run", at_least=0)
    warmup_ratio: float = setting(0.0, _RUN, "or this share of the run", at_least=0, below=1, hidden=True)
    weight_decay: float = setting(0.0, _RUN, "AdamW's weight decay", at_least=0)
    max_grad_norm: float = setting(1.0, _RUN, "clip the gradient's norm (0: off)", at_least=0)
    optim: Literal["paged_adamw_32bit", "paged_adamw_8bit", "adamw_torch"] = setting(
        "paged_adamw_32bit", _RUN, "also …_8bit or adamw_torch", metavar="NAME"
    )
    seed: int = setting(42, _RUN, "of split, order and LoRA", at_least=0, at_most=_SEED_LIMIT)

    cutoff_len: int = setting(256, _DATA, "longest row in tokens", at_least=2)
    source_max_len: int | None = setting(None, _DATA, "instead, and --target_max_len: longest prompt", at_least=1)
    target_max_len: int | None = setting(None, _DATA, "longest answer", at_least=1, hidden=True)
    max_train_samples: int | None = setting(None, _DATA, "train on the first N rows", at_least=1)
    max_eval_samples: int | None = setting(None, _DATA, "measure on the first N held out", at_least=1, hidden=True)
    val_set_size: int = _profiled("val_set_size", _DATA, "rows held out (0: none)", at_least=0)
    train_on_inputs: bool = _profiled("train_on_inputs", _DATA, "count the prompt in the loss too")
    group_by_length: bool = _profiled("group_by_length", _DATA, "batch rows of similar length")
    packing: bool = setting(False, _DATA, "several rows to a sequence, kept apart")
    prompt_template_name: str = _profiled("prompt_template_name", _DATA, "name or file", metavar="NAME")
    preview: int = setting(0, _DATA, "show N rows as they are learnt, and stop", at_least=0)
    tokenized_cache: bool = setting(True, _DATA, "keep tokenized rows on disk for the next run", hidden=True)

    lora_r: int = setting(8, _LORA, "rank", at_least=1)
    lora_alpha: float = setting(16.0, _LORA, "scale: alpha / r", above=0)
    lora_dropout: float = setting(0.05, _LORA, "dropout before A", at_least=0, below=1)
    lora_target_modules: tuple[str, ...] = _profiled(
        "lora_target_modules", _LORA, "layers to adapt", metavar="A,B"
    )
    use_rslora: bool = setting(False, _LORA, "scale by alpha / sqrt(r)", hidden=True)

    quantize: Literal["nf4", "none"] = setting("nf4", _MEMORY, "how the base model is kept")
    double_quant: bool = setting(True, _MEMORY, "quantize NF4's scales too", hidden=True)
    max_memory_MB: int = setting(
        0, _MEMORY, "keep to N MB there, say 5400 (0: no limit)", at_least=0
    )
    gradient_checkpointing: bool = setting(False, _MEMORY, "less memory, a third more time")
    checkpointed_layers: int = setting(0, _MEMORY, "that, for the first N layers only", at_least=0)
    offload_checkpoints: bool = setting(False, _MEMORY, "keep those layers' inputs on the host")
    offload_embedding: bool = setting(False, _MEMORY, "keep the input embedding on the host")
    offload_head: bool = setting(False, _MEMORY, "stream the head from the host in slices")
    offload_layers: int = setting(0, _MEMORY, "stream N layers' weights from the host", at_least=0)
    offload_folder: str | None = setting(
        None, _MEMORY, "for what is offloaded; left out: RAM", path=True, metavar="DIR"
    )
    resident_optimizer_MB: int | None = setting(
        None, _MEMORY, "of AdamW's moments on the device; left out: all", at_least=0
    )
    fsdp: bool = setting(False, _MEMORY, "shard frozen weights over processes", hidden=True)
    dtype: Literal["auto", "bf16", "fp32"] = setting("auto", _MEMORY, "of the arithmetic")
    device: str = setting("auto", _MEMORY, "auto, cpu, cuda or cuda:N", metavar="DEVICE")
    compile: bool = setting(False, _MEMORY, "torch.compile the layers; on a CPU 0.8x")

    logging_steps: int = _profiled("logging_steps", _LOGS, "log every N steps", at_least=1)
    eval_steps: int = setting(200, _LOGS, "held-out loss every N steps", at_least=1)
    eval_epochs: bool = setting(False, _LOGS, "instead: at the end of each epoch", hidden=True)
    report_to: tuple[str, ...] | None = setting(
        None, _LOGS, "tensorboard, wandb, all or none", example="tensorboard and wandb, or all or none",
        empty_is_none=True, metavar="NAME",
    )  # fmt: skip
    logging_dir: str | None = setting(None, _LOGS, "TensorBoard's files", path=True, metavar="DIR", hidden=True)
    wandb_project: str | None = setting(None, _LOGS, "wandb's project", empty_is_none=True, hidden=True)
    wandb_run_name: str | None = setting(None, _LOGS, "the run's name there", empty_is_none=True, hidden=True)
    wandb_watch: Literal["false", "gradients", "all"] | None = setting(
        None, _LOGS, "histograms there", empty_is_none=True, also=("False", "parameters"), hidden=True
    )
    wandb_log_model: bool = setting(False, _LOGS, "send it the adapter", empty_is_none=True, hidden=True)
    json: bool = setting(False, _LOGS, "for machines: JSON, an object a line")
    bar: bool = setting(True, _LOGS, "on a terminal, a bar in place of lines", hidden=True)

    profile_steps: int = setting(0, _LOGS, "profile N steps, the first two aside", at_least=0, hidden=True)

    save_steps: int = _profiled("save_steps", _LOGS, "a checkpoint every N steps (0: none)", at_least=0)
    save_epochs: bool = setting(False, _LOGS, "instead: at the end of each epoch", hidden=True)
    save_total_limit: int = _profiled("save_total_limit", _LOGS, "keep the newest N", at_least=1, hidden=True)
    resume: bool = setting(False, _LOGS, "go on from the newest valid one, if any")
    resume_from_checkpoint: str | None = setting(
        None, _LOGS, "from this one; True: the newest", path=True, empty_is_none=True, metavar="DIR", hidden=True
    )
    load_best_model_at_end: bool = _profiled("load_best_model_at_end", _LOGS, "the one measured best", hidden=True)

    do_mmlu_eval: bool = setting(False, _MMLU, "measure on MMLU's questions too")
    mmlu_path: str | None = setting(None, _MMLU, "their file or folder", path=True, metavar="FILE", hidden=True)
    mmlu_dataset: Literal["mmlu-fs", "mmlu-zs", "mmlu"] = setting("mmlu-fs", _MMLU, "which in a folder", hidden=True)
    mmlu_split: Literal["eval", "test"] = setting("eval", _MMLU, "which of them", hidden=True)
    max_mmlu_samples: int | None = setting(None, _MMLU, "the first N", at_least=1, hidden=True)
    mmlu_source_max_len: int = setting(2048, _MMLU, "longest question in tokens", at_least=2, hidden=True)

    predict_with_generate: bool = setting(False, _LOGS, "answer the held-out rows at the end", hidden=True)
    max_new_tokens: int = setting(256, _SAMPLING, "longest of these answers in tokens", at_least=1, hidden=True)
    do_sample: bool = setting(False, _SAMPLING, "sample them; else greedy", hidden=True)
    temperature: float = setting(1.0, _SAMPLING, "of the sampling", at_least=0, hidden=True)
    top_p: float = setting(1.0, _SAMPLING, "from this share of the probability", above=0, at_most=1, hidden=True)
    top_k: int = setting(50, _SAMPLING, "from the k likeliest (0: all)", at_least=0, hidden=True)

    def __post_init__(self) -> None:
        read_fields(self)
        check_device(self.device)
        check_together(self)

    @property
    def accumulation_steps(self) -> int:
        """Micro batches to one optimizer step: batch_size // micro_batch_size, as alpaca-lora counts."""
        return self.batch_size // self.micro_batch_size

    def warmup(self, total: int) -> int:
        """Steps over which the learning rate rises, of `total`."""
        return math.ceil(self.warmup_ratio * total) if self.warmup_ratio else min(self.warmup_steps, total // 10)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """The settings of `jindo-core generate`. Raises InputError when a value is wrong."""

    base_model: str | None = setting(
        None,
        _MODEL,
        "folder, .gguf file or Hub id; left out: $BASE_MODEL, else the adapter's",
        path=True,
        metavar="MODEL",
    )
    lora_weights: str | None = setting(
        None, _MODEL, "folder of a LoRA adapter in PEFT's format; left out: none", path=True, metavar="DIR"
    )
    instruction: str | None = setting(
        None, "the request", "what to do; left out: read from standard input", verbatim=True, metavar="TEXT"
    )
    input: str | None = setting(
        None,
        "the request",
        "what to do it with; left out: nothing",
        verbatim=True,
        empty_is_none=True,
        metavar="TEXT",
    )
    system: str | None = setting(
        None,
        "the request",
        "a system message; left out: the template's own, if any",
        verbatim=True,
        empty_is_none=True,
        metavar="TEXT",
    )
    prompt_template_name: str | None = setting(
        None, "the request", "a template's name or file; left out: the adapter's, else alpaca", metavar="NAME"
    )
    max_new_tokens: int = setting(128, _SAMPLING, "longest answer in tokens", at_least=1)
    temperature: float = setting(0.0, _SAMPLING, "0: always the likeliest token (greedy)", at_least=0)
    top_p: float = setting(1.0, _SAMPLING, "sample from this share of the probability", above=0, at_most=1)
    top_k: int = setting(0, _SAMPLING, "sample from the k likeliest tokens (0: all)", at_least=0)
    seed: int = setting(42, _SAMPLING, "of the sampling", at_least=0, at_most=_SEED_LIMIT)
    stream: bool = setting(True, _SAMPLING, "print the answer while it is written")

    quantize: Literal["nf4", "none"] = setting("nf4", _MEMORY, "how the base model is kept")
    load_8bit: bool = setting(False, _MEMORY, "alpaca-lora's; NF4 serves", hidden=True)
    double_quant: bool = setting(True, _MEMORY, "quantize NF4's scales too")
    offload_embedding: bool = setting(False, _MEMORY, "keep the input embedding on the host")
    offload_head: bool = setting(False, _MEMORY, "stream the head from the host in slices")
    offload_layers: int = setting(0, _MEMORY, "stream N layers' weights from the host", at_least=0)
    offload_folder: str | None = setting(
        None, _MEMORY, "for what is offloaded; left out: RAM", path=True, metavar="DIR"
    )
    dtype: Literal["auto", "bf16", "fp32"] = setting("auto", _MEMORY, "of the arithmetic")
    device: str = setting("auto", _MEMORY, "auto, cpu, cuda or cuda:N", metavar="DEVICE")

    def __post_init__(self) -> None:
        read_fields(self)
        check_device(self.device)
        for name in ("instruction", "input"):
            text = getattr(self, name)
            # Bytes on a command line that are no UTF-8 arrive as lone surrogates, which no tokenizer takes.
            if text is not None and not text.isascii() and re.search("[\ud800-\udfff]", text):
                raise InputError(f"--{name}: got bytes that are no UTF-8, expected text in UTF-8")


def read_fields(config: Config) -> None:
    """Read every field of a config by its setting, in place; for `__post_init__`. Raises InputError."""
    for name, known in settings(type(config)).items():
        object.__setattr__(config, name, known.read(getattr(config, name)))


def check_device(device: str) -> None:
    """See that a device's name is well formed; whether it is there shows later. Raises InputError."""
    if not _DEVICE.fullmatch(device):
        raise InputError(f"--device: got {device!r}, expected auto, cpu, cuda or cuda:N such as cuda:0")


def accepted(config_class: type[Config]) -> dict[str, Setting]:
    """What may be given for a config class: its settings, and for train's what other trainers call them."""
    own = settings(config_class)
    if "profile" not in own:
        return own
    for name, values in qlora.OTHER_VALUES.items():
        own[name] = dataclasses.replace(own[name], also=tuple(values))
    return own | {name: flag.setting(own) for name, flag in qlora.FLAGS.items()}


def did_you_mean(name: str, config_class: type[Config], prefix: str = "") -> str:
    """`" Did you mean 'lora_r'?"` for a name that is no setting, or `""`; `prefix` goes before the name."""
    known = list(accepted(config_class))
    meant = [setting for setting, names in _SAID_ELSEWHERE.items() if name in names.split()]
    if name in qlora.FLAGS:
        meant.append(qlora.FLAGS[name].ours)
    if meant and meant[0] in known:
        return f" Did you mean '{prefix}{meant[0]}'?"
    if name in qlora.FLAGS and not qlora.FLAGS[name].ours:
        return ""  # another trainer's, which nothing here is like
    # What has an effect first: lora_rank is as close to local_rank as to lora_r.
    idle = {flag.name for flag in qlora.FLAGS.values() if flag.does not in ("setting", "rule")}
    found = nearest(name, [word for word in known if word not in idle]) or nearest(name, known)
    return found.replace("'", f"'{prefix}", 1)  # compared without its dashes, which all have


PROFILED = 3
"""Steps that a bare --profile profiles."""


def meant(name: str, value: object) -> tuple[str, object]:
    """What a person means by `--profile`: bare or with a number, steps to profile; with a name, whose defaults."""
    if name != "profile" or value is None:
        return name, value
    said = str(value).strip().lower()
    if said.lstrip("-").isdecimal():
        return "profile_steps", int(said)
    if said in ("true", "false"):
        return "profile_steps", PROFILED if said == "true" else 0
    return name, value


def _read_given(given: Mapping[str, Any], config_class: type[Config]) -> dict[str, Any]:
    known = accepted(config_class)
    if "profile" in known:
        given = dict(meant(name, value) for name, value in given.items())
    for name in given:
        if name not in known:
            raise InputError(
                f"got the unknown setting {name!r}, expected one of {config_class.__name__}'s."
                f"{did_you_mean(name, config_class)}"
            )
    return {name: known[name].read(value) for name, value in given.items() if value is not None}


def settle(
    given: Mapping[str, Any], config_class: type[Config] = TrainConfig, otherwise: str = "embedded"
) -> tuple[dict[str, Any], frozenset[str], tuple[str, ...]]:
    """Settings for what a person gave, in our names: all that is not its field's default; theirs; what to tell them.

    The profile is what `--profile` says, else that of the names given for model and data, else `otherwise`. A default
    never contradicts what was given: of batch_size and micro_batch_size the one left out gives way, and so do
    separate lengths beside a given cutoff_len.

    Raises:
        InputError: an unknown name, a wrong value, or two that contradict.
    """
    typed = _read_given(given, config_class)
    profile = typed.get("profile") or _profile_of(typed, otherwise)
    own, notices = qlora.translate(typed, profile, PROFILES[profile])
    values = {**PROFILES[profile], "profile": profile, **_read_given(own, config_class)}
    if "micro_batch_size" not in own:
        values["micro_batch_size"] = min(values["micro_batch_size"], values["batch_size"])
    elif "batch_size" not in own:
        values["batch_size"] = max(values["micro_batch_size"], values["batch_size"])
    _settle_lengths(values, own, notices)
    _say_what_is_idle(values, own, notices)
    return values, frozenset(own), notices.lines()


def _profile_of(typed: Mapping[str, Any], otherwise: str) -> str:
    alpaca, other = ([name for name in names if name in typed] for names in _FAMILIES.values())
    if alpaca and other:
        raise InputError(
            f"--{other[0]}: got it beside --{alpaca[0]}; one is qlora.py's name and one alpaca-lora's, whose defaults "
            "differ: give --profile qlora or --profile alpaca, or the names of one"
        )
    return "qlora" if other else "alpaca" if "base_model" in typed else otherwise


def _settle_lengths(values: dict[str, Any], own: Mapping[str, Any], notices: qlora.Notices) -> None:
    """Afterwards cutoff_len is the longest row, however it was said."""
    apart = ("source_max_len", "target_max_len")
    if "cutoff_len" in own and not any(name in own for name in apart):
        values.update(dict.fromkeys(apart))
    elif all(values.get(name) for name in apart):
        if "cutoff_len" in own:
            notices.add("no effect beside --source_max_len and --target_max_len", "cutoff_len")
        values["cutoff_len"] = values["source_max_len"] + values["target_max_len"]


def _say_what_is_idle(values: Mapping[str, Any], own: Mapping[str, Any], notices: qlora.Notices) -> None:
    if values["profile"] == "qlora" and "data_path" not in own:
        notices.add("no --dataset: alpaca is used, as in qlora.py")
    if values.get("packing") and own.get("group_by_length"):
        notices.add("no effect with --packing, which fills every sequence", "group_by_length")
    if "max_eval_samples" in own and not values["val_set_size"]:
        notices.add("no effect: no row is held out (--val_set_size, --do_eval)", "max_eval_samples")
    answering = [name for name in own if name in _SAMPLED]
    if values.get("predict_with_generate"):
        if not values["val_set_size"]:
            notices.add("no effect: no row is held out (--val_set_size, --do_eval)", "predict_with_generate")
        if idle := [name for name in answering if name in _DRAWN and not values.get("do_sample")]:
            notices.add("no effect without --do_sample", *idle)
    elif answering:
        notices.add("no effect without --do_predict", *answering)
    for what in ("save", "eval"):
        if values.get(f"{what}_epochs") and f"{what}_steps" in own:
            notices.add(f"no effect with --{what}_epochs", f"{what}_steps")
    if not values.get("do_mmlu_eval"):
        idle = [name for name in own if "mmlu_" in name and name != "do_mmlu_eval"]
        if idle:
            notices.add("no effect without --do_mmlu_eval", *idle)


def resolve_train_config(given: Mapping[str, Any]) -> tuple[TrainConfig, frozenset[str], tuple[str, ...]]:
    """The whole config from the settings that a person gave (flags over file), their names in ours, and what to tell
    them. A None counts as not given. Raises InputError as `settle` and `TrainConfig` do."""
    values, explicit, notices = settle(given)
    return TrainConfig(**values), explicit, notices


def resolve_generate_config(given: Mapping[str, Any]) -> GenerateConfig:
    """The config from the settings that a person gave. Raises InputError as `resolve_train_config` does."""
    return GenerateConfig(**_read_given(given, GenerateConfig))
