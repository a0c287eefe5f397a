"""The flags of qlora.py and of alpaca-lora's finetune.py that `train` has no setting of the same name for.

Each is in `FLAGS` with what becomes of it: another of our settings, one together with others (`_RULES`), nothing
for a reason, or a refusal. `translate` applies them; nothing that has no effect is passed over in
silence. docs/qlora.md shows the table, and a test holds the two together. Source of names, defaults and effects:
qlora.py (ModelArguments, DataArguments, TrainingArguments, GenerationArguments) and transformers'
Seq2SeqTrainingArguments, which it inherits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from jindo_core.errors import InputError
from jindo_core.settings import Setting

PROFILE: dict[str, Any] = {
    "output_dir": "./output",
    "data_path": ("alpaca",),
    "batch_size": 16,
    "micro_batch_size": 1,
    "num_epochs": 3.0,
    "max_steps": 10000,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 0.3,
    "source_max_len": 1024,
    "target_max_len": 256,
    "val_set_size": 0,
    "lora_r": 64,
    "lora_alpha": 16.0,
    "lora_dropout": 0.0,
    "lora_target_modules": ("all-linear",),
    "train_on_inputs": False,
    "group_by_length": True,
    "prompt_template_name": "qlora_alpaca",
    "max_memory_MB": 80000,
    "gradient_checkpointing": True,
    "logging_steps": 10,
    "save_steps": 250,
    "save_total_limit": 40,
    "load_best_model_at_end": False,
}
"""qlora.py's defaults, in our settings."""

HELD_OUT = 1024
"""Rows that qlora.py holds out where an evaluation is asked for."""

WARMUP_RATIO = 0.03
"""qlora.py's default, which counts only with a schedule that warms up."""


@dataclass(frozen=True)
class Flag:
    """One flag of another trainer.

    Attributes:
        kind: how its value is read, as in `Setting`; "word": anything, for its value changes nothing here.
        does: "setting": it is our setting `ours`; "rule": it decides about `ours` together with others; "inert":
            nothing, for the reason in `note`; "refused": an error with that reason.
        as_is: values that ask for what is done anyway, of which nothing needs to be said; words in lower case.
    """

    name: str
    does: Literal["setting", "rule", "inert", "refused"]
    ours: str = ""
    note: str = ""
    kind: Literal["int", "float", "bool", "text", "word"] = "word"
    as_is: tuple[Any, ...] = ()
    at_least: float | None = None

    def setting(self, own: Mapping[str, Setting]) -> Setting:
        """How its value is read. own: our settings."""
        if self.does == "setting":
            return replace(own[self.ours], name=self.name, hidden=True)
        return Setting(self.name, self.kind, self.note, group="", default=None, hidden=True, at_least=self.at_least)


_NOTHING = ("", "none", "false", "0", "no", "off")
_YES = ("true", "1", "yes", "on")
_NO_SUCH_SETTING = "answers are greedy, or sampled as --temperature, --top_k and --top_p say, and no otherwise"
_NEW_TOKENS = "--max_new_tokens says how long an answer may be"
_OWN_CODE = "models are built from the engine's own code: nothing of a checkpoint's is ever run"
_HUB_LOGIN = "the Hub's own login counts: hf auth login, or HF_TOKEN"
_MICRO = "held-out rows go through in micro-batches too, or in what memory leaves room for"
_LOGGED = "every step is written to metrics.jsonl; --logging_steps says which are shown"
_ROWS_READY = "rows are tokenized before the first step, and a thread reads them a step ahead"
_TORCHRUN = "several GPUs are torchrun's and --fsdp's here"
_BETAS = "AdamW runs with betas 0.9 and 0.999 and eps 1e-8: leave it out"


def _inert(names: str, note: str, as_is: tuple[Any, ...] = ()) -> list[Flag]:
    return [Flag(name, "inert", note=note, as_is=as_is) for name in names.split()]


def _refused(names: str, note: str, as_is: tuple[Any, ...] = _NOTHING) -> list[Flag]:
    return [Flag(name, "refused", note=note, as_is=as_is) for name in names.split()]


_TABLE = [
    # the model
    Flag("model_name_or_path", "setting", "base_model"),
    *_inert("trust_remote_code", _OWN_CODE),
    *_inert("use_auth_token use_auth token", _HUB_LOGIN),
    *_inert("cache_dir", "the Hub's own cache is used: HF_HOME says where it lies"),
    *_refused("full_finetune", "only adapters are trained, on frozen weights: leave it out"),
    # data
    Flag("dataset", "setting", "data_path"),
    Flag("train_on_source", "setting", "train_on_inputs"),
    Flag("eval_dataset_size", "rule", "val_set_size", kind="int", at_least=1),
    Flag("do_eval", "rule", "val_set_size", kind="bool"),
    Flag("evaluation_strategy", "rule", "eval_steps", "steps, epoch (--eval_epochs), or no", kind="text"),
    Flag("eval_strategy", "rule", "eval_steps", "steps, epoch (--eval_epochs), or no", kind="text"),
    *_inert("data_seed", "one seed serves split, order and LoRA: --seed"),
    *_inert("remove_unused_columns", "a format names the columns it reads; the others are never loaded"),
    *_inert("dataloader_num_workers dataloader_pin_memory dataloader_drop_last", _ROWS_READY),
    # quantization and arithmetic
    Flag("bits", "rule", "quantize", "4: nf4; 16, 32: none; 8: nf4, with a notice", kind="int"),
    Flag("quant_type", "rule", "quantize", "nf4; fp4: nf4, with a notice", kind="text"),
    Flag("bf16", "rule", "dtype", "bf16", kind="bool"),
    Flag("fp16", "rule", "dtype", "auto, with a notice", kind="bool"),
    *_inert("tf32", "bf16 or fp32, as --dtype says", _NOTHING),
    # LoRA
    Flag("lora_modules", "rule", "lora_target_modules", "all: all-linear", kind="text"),
    # the run
    Flag("per_device_train_batch_size", "setting", "micro_batch_size"),
    Flag("gradient_accumulation_steps", "rule", "batch_size", "times micro_batch_size", kind="int", at_least=1),
    Flag("num_train_epochs", "setting", "num_epochs"),
    Flag("adam_beta1", "refused", note=_BETAS, kind="float", as_is=(0.9,)),
    Flag("adam_beta2", "refused", note=_BETAS, kind="float", as_is=(0.999,)),
    Flag("adam_epsilon", "refused", note=_BETAS, kind="float", as_is=(1e-8,)),
    *_inert("adam8bit", "qlora.py never reads it; --optim paged_adamw_8bit keeps AdamW's moments in 8 bits", _NOTHING),
    *_refused("do_train", "training is what this command does: jindo-core eval --tasks generation answers", _YES),
    Flag("do_predict", "rule", "predict_with_generate", "and rows are held out", kind="bool"),
    *_inert("per_device_eval_batch_size eval_accumulation_steps", _MICRO),
    *_refused("deepspeed ddp_find_unused_parameters", _TORCHRUN + ": leave it out"),
    *_refused("local_rank", _TORCHRUN + ": leave it out", ("-1",)),
    *_inert("ddp_backend ddp_timeout", _TORCHRUN),
    # generation
    *_inert("use_cache", "keys and values are always kept", _YES),
    *_inert("generation_max_length", _NEW_TOKENS, _NOTHING),
    *_inert("num_beams num_beam_groups generation_num_beams", _NO_SUCH_SETTING, (*_NOTHING, "1")),
    *_inert("typical_p repetition_penalty length_penalty", _NO_SUCH_SETTING, ("none", "1", "1.0")),
    *_inert("min_new_tokens penalty_alpha", _NO_SUCH_SETTING, (*_NOTHING, "0.0")),
    *_inert("diversity_penalty no_repeat_ngram_size", _NO_SUCH_SETTING, (*_NOTHING, "0.0")),
    # files and reports
    Flag("save_strategy", "rule", "save_steps", "steps, epoch (--save_epochs), or no for none", kind="text"),
    *_inert("logging_strategy logging_first_step", _LOGGED),
    Flag("disable_tqdm", "rule", "bar", "True: lines in place of the bar, on a terminal too", kind="bool"),
    Flag("run_name", "setting", "wandb_run_name"),
    *_refused("push_to_hub", "nothing is sent anywhere: hf upload, or jindo-core export --push_to_hub"),
    # alpaca-lora's
    *_inert("add_eos_token", "EOS is learnt wherever the answer fits, as alpaca-lora does without it too"),
]
FLAGS: dict[str, Flag] = {flag.name: flag for flag in _TABLE}

OTHER_VALUES: dict[str, dict[str, str]] = {
    "optim": {
        "paged_adamw": "paged_adamw_32bit", "adamw_hf": "adamw_torch", "adamw_torch_fused": "adamw_torch",
        "adamw_8bit": "paged_adamw_8bit", "adamw_bnb_8bit": "paged_adamw_8bit",
        "paged_adamw_bnb_8bit": "paged_adamw_8bit",
    },
    "lr_scheduler_type": {"constant_with_warmup": "constant"},
}  # fmt: skip
"""Values that others have for settings of the same name as ours, and ours that serves them."""


def ours(name: str) -> str:
    """The setting that a flag is another name for; else the name itself."""
    flag = FLAGS.get(name)
    return flag.ours if flag is not None and flag.does == "setting" else name


class Notices:
    """What is to be said, flags with the same reason in one line."""

    def __init__(self) -> None:
        self._flags: dict[str, list[str]] = {}

    def add(self, note: str, *names: str) -> None:
        self._flags.setdefault(note, []).extend(f"--{name}" for name in names)

    def lines(self) -> tuple[str, ...]:
        return tuple(f"{', '.join(flags)}: {note}" if flags else note for note, flags in self._flags.items())


@dataclass(frozen=True)
class _Given:
    """A command line on its way into our settings. own: ours, filled in; other: the other trainers', as typed."""

    own: dict[str, Any]
    other: Mapping[str, Any]
    profile: str
    defaults: Mapping[str, Any]
    notices: Notices

    def put(self, name: str, ours: str, value: Any) -> None:
        if ours in self.own and self.own[ours] != value:
            raise InputError(f"--{name}: got it beside --{ours}, which says the same: give one of them")
        self.own[ours] = value

    def now(self, ours: str) -> Any:
        return self.own.get(ours, self.defaults.get(ours))


def translate(given: Mapping[str, Any], profile: str, defaults: Mapping[str, Any]) -> tuple[dict[str, Any], Notices]:
    """Our settings for what was given, and what is to be said about it.

    Args:
        given: values by name, ours and those in `FLAGS`, each read in its own type.
        profile, defaults: whose defaults count, and those.
    Raises:
        InputError: a flag that can't be served, or two that contradict.
    """
    other = {name: value for name, value in given.items() if name in FLAGS}
    own = {name: value for name, value in given.items() if name not in FLAGS}
    line = _Given(own, other, profile, defaults, Notices())
    for name, value in other.items():
        flag = FLAGS[name]
        if flag.does == "rule" or (value.lower() if isinstance(value, str) else value) in flag.as_is:
            continue
        if flag.does == "refused":
            raise InputError(f"--{name}: {flag.note}")
        if flag.does == "setting":
            line.put(name, flag.ours, value)
        else:
            line.notices.add(flag.note, name)
    for rule in _RULES:
        rule(line)
    return own, line.notices


def _batches(line: _Given) -> None:
    accumulation = line.other.get("gradient_accumulation_steps")
    if accumulation is not None:
        line.put("gradient_accumulation_steps", "batch_size", line.now("micro_batch_size") * accumulation)
    elif line.profile == "qlora" and "micro_batch_size" in line.own:  # that default counts micro-batches, not rows
        line.own.setdefault("batch_size", line.own["micro_batch_size"] * PROFILE["batch_size"])


def _quantization(line: _Given) -> None:
    bits = line.other.get("bits")
    kept = {4: "nf4", 8: "nf4", 16: "none", 32: "none"}
    if bits is not None:
        if bits not in kept:
            raise InputError(f"--bits: got {bits}, expected 4, or 16 for weights that are not quantized")
        line.put("bits", "quantize", kept[bits])
        if bits == 8:
            line.notices.add("8-bit weights are served by NF4, which takes half the memory", "bits 8")
        if bits == 32:
            line.own.setdefault("dtype", "fp32")
    kind = line.other.get("quant_type")
    if kind not in (None, "nf4", "fp4"):
        raise InputError(f"--quant_type: got {kind!r}, expected nf4, or fp4, which it serves")
    if kind == "fp4":
        line.notices.add("FP4 is served by NF4, as large and closer to the weights", "quant_type fp4")


def _precision(line: _Given) -> None:
    if line.other.get("bf16") and line.other.get("fp16"):
        raise InputError("--fp16: got it beside --bf16, expected one of them")
    if line.other.get("bf16"):
        line.put("bf16", "dtype", "bf16")
    if line.other.get("fp16"):
        line.notices.add("no fp16, in which gradients overflow: bf16 where the device has it, else fp32", "fp16")


def _held_out(line: _Given) -> None:
    named = next((name for name in ("eval_strategy", "evaluation_strategy") if name in line.other), "")
    strategy, size = line.other.get(named, "no"), line.other.get("eval_dataset_size")
    if strategy not in ("no", "steps", "epoch"):
        raise InputError(f"--{named}: got {strategy!r}, expected steps, epoch or no")
    wanted = strategy != "no" or line.other.get("do_eval") or line.other.get("do_predict")
    if not wanted and size is not None:
        note = "qlora.py holds rows out only with --do_eval or --do_predict: all are trained on"
        line.notices.add(note, "eval_dataset_size")
    if wanted and size is not None:
        line.put("eval_dataset_size", "val_set_size", size)
    elif wanted and line.profile == "qlora":
        line.own.setdefault("val_set_size", HELD_OUT)
    elif line.other.get("do_eval") is False and strategy == "no":
        line.put("do_eval", "val_set_size", 0)
    if strategy == "steps" and "eval_steps" not in line.own:  # transformers' default
        line.own["eval_steps"] = line.now("logging_steps")
    elif wanted and strategy == "no" and "eval_steps" in line.own:
        line.notices.add("counts without --evaluation_strategy too", "eval_steps")
    if strategy == "epoch":
        line.put(named, "eval_epochs", True)


def _predictions(line: _Given) -> None:
    """qlora.py predicts with --do_predict, and answers only with --predict_with_generate beside it: here both do."""
    if line.other.get("do_predict"):
        if line.own.setdefault("predict_with_generate", True) is False:
            line.notices.add("nothing is predicted with --predict_with_generate False", "do_predict")
    elif "do_predict" in line.other and line.own.pop("predict_with_generate", False):
        line.notices.add("no effect with --do_predict False", "predict_with_generate")


def _checkpoints(line: _Given) -> None:
    strategy = line.other.get("save_strategy", "steps")
    if strategy not in ("no", "steps", "epoch"):
        raise InputError(
            f"--save_strategy: got {strategy!r}, expected steps (--save_steps says how many), epoch or no"
        )
    if "save_strategy" in line.other:
        line.put("save_strategy", "save_epochs", strategy == "epoch")
    if strategy == "no":
        if "save_steps" in line.own:
            line.notices.add("no effect with --save_strategy no", "save_steps")
        line.own["save_steps"] = 0


def _modules(line: _Given) -> None:
    named = line.other.get("lora_modules")
    if named is not None:
        line.put("lora_modules", "lora_target_modules", "all-linear" if named == "all" else named)


def _optimizer(line: _Given) -> None:
    given = line.own.get("optim")
    if given in OTHER_VALUES["optim"]:
        line.own["optim"] = OTHER_VALUES["optim"][given]
        line.notices.add(f"served by {line.own['optim']}", f"optim {given}")


def _schedule(line: _Given) -> None:
    """transformers' constant schedule never warms up; ours does, by what warmup_steps or warmup_ratio say."""
    warms = line.own.get("lr_scheduler_type") == "constant_with_warmup"
    if warms:
        line.own["lr_scheduler_type"] = "constant"
    given = [name for name in ("warmup_ratio", "warmup_steps") if line.own.get(name)]
    if given and line.profile != "qlora" and line.own.get("lr_scheduler_type") == "constant" and not warms:
        note = "warms up to the constant rate; transformers' constant schedule never does (0: nor here)"
        line.notices.add(note, *given)
    if line.profile == "qlora" and line.now("lr_scheduler_type") == "constant" and not warms:
        line.own.update(warmup_steps=0, warmup_ratio=0.0)
        if given:
            note = "no effect with a constant schedule, here as in qlora.py: --lr_scheduler_type constant_with_warmup"
            line.notices.add(note, *given)
    elif len(given) == 2:
        line.own["warmup_ratio"] = 0.0
        line.notices.add("no effect beside --warmup_steps", "warmup_ratio")
    elif line.profile == "qlora" and not given:
        line.own.setdefault("warmup_ratio", WARMUP_RATIO)


def _bar(line: _Given) -> None:
    if "disable_tqdm" in line.other:
        line.put("disable_tqdm", "bar", not line.other["disable_tqdm"])


def _epochs(line: _Given) -> None:
    if line.profile == "qlora" and "num_epochs" in line.own and "max_steps" not in line.own:
        line.own["max_steps"] = -1
        note = f"counts; qlora.py would run its default of {PROFILE['max_steps']} steps whatever it says"
        line.notices.add(note, "num_train_epochs" if "num_train_epochs" in line.other else "num_epochs")


_RULES: tuple[Callable[[_Given], None], ...] = (
    _batches, _precision, _quantization, _held_out, _predictions, _checkpoints, _modules, _optimizer, _schedule,
    _epochs, _bar,
)  # fmt: skip
