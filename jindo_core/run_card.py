"""The run card: README.md beside an adapter, which says what it is, what made it and how to use it.

Its first lines are the Hub's metadata (https://huggingface.co/docs/hub/model-cards), of which only what is known is
given. Paths are shortened to what a person typed inside the working directory, or to their last part.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jindo_core import __version__, embedded
from jindo_core.config import PROFILES, TrainConfig, resolve_train_config
from jindo_core.data.formats import named_dataset
from jindo_core.files import write_atomically
from jindo_core.hub import HUB, looks_like_hub_id
from jindo_core.prepare import TrainingJob
from jindo_core.resume import surroundings
from jindo_core.run_record import METRICS, by_name, shown
from jindo_core.settings import Setting, settings

CARD, OTHER_CARD = "README.md", "RUN.md"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
"""owner/name; a pattern of files is none."""
MARK = "<!-- Written by jindo-core; its next run in this folder replaces it. Without this line it is left alone. -->"
_ENGINE = ("torch", "transformers", "safetensors")
_ROWS = {
    "held_out_loss": ("held-out loss", "{:.4f}"),
    "held_out_perplexity": ("held-out perplexity", "{:,.2f}"),
    "mmlu_accuracy": ("MMLU accuracy, mean of its subjects", "{:.4f}"),
}
_PREDICTED = {
    "predict_exact_match": "exact match {:.4f}",
    "predict_chrf": "chrF {:.2f}",
    "predict_ended": "{:.1%} ended by themselves",
    "predict_mean_tokens": "{:.1f} tokens on average",
}


@dataclass(frozen=True)
class Card:
    """What a card tells of.

    Attributes:
        figures: `outcome.figures_of` the run. answers: (instruction, before, after). command: `command_of` it.
    """

    job: TrainingJob
    figures: Mapping[str, Any]
    answers: Sequence[tuple[str, str, str]]
    command: str

    def text(self, folder: Path) -> str:
        """The whole file. folder: where it will lie."""
        parts = (self._front(), MARK, self._title(folder), self._results(folder), self._data(), self._use(folder),
                 self._settings(), self._versions())  # fmt: skip
        return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"

    def _front(self) -> str:
        import yaml

        config = self.job.config
        found: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation"}
        if (base := _hub_base(config)) is not None:
            found["base_model"] = base
        if sets := list(filter(None, map(_hub_data, config.data_path or ()))):
            found["datasets"] = sets
        if config.data_path is None:
            found["language"] = ["ko"]  # the bundled rows'; of others nothing is known
        found["tags"] = ["lora", *(["qlora"] if config.quantize == "nf4" else []), "jindo-core"]
        return f"---\n{yaml.safe_dump(found, sort_keys=False, allow_unicode=True)}---"

    def _title(self, folder: Path) -> str:
        job = self.job
        config, kept = job.config, "NF4" if job.config.quantize == "nf4" else "16 or 32 bits"
        adapted = ", ".join(config.lora_target_modules).replace("all-linear", "all linear layers")
        return (
            f"# {_plain(folder.resolve().name)}\n\n"
            f"A LoRA adapter (r {config.lora_r}, alpha {config.lora_alpha:g}, on {adapted}) of "
            f"{_code(_base(config))}, trained with jindo-core on the base model's weights in {kept}."
        )

    def _results(self, folder: Path) -> str:
        figures = self.figures
        lines = ["## Results", "", "| | before | after |", "|---|---|---|"]
        for name, (said, form) in _ROWS.items():
            values = [figures.get(f"{name}_{when}") for when in ("before", "after")]
            if any(value is not None for value in values):
                shown = " | ".join("-" if value is None else form.format(value) for value in values)
                lines.append(f"| {said} | {shown} |")
        table = lines if len(lines) > 4 else lines[:1]
        steps, kept = figures["steps"], figures["adapter_of_step"]
        after = "" if steps == kept else f", of which the adapter is that of step {kept}, measured best"
        model = self.job.model
        device, dtype = surroundings(model.device)["device"], str(model.dtype).removeprefix("torch.")
        facts = (
            f"{len(self.job.held_out):,} rows were held out. {steps:,} steps{after}; {figures['skipped_steps']:,} "
            f"skipped for a gradient that was not finite. {figures['tokens_per_second']:,.0f} tokens/s, peak memory "
            f"{figures['peak_bytes'] / 1e6:,.0f} MB, on {device}, in {dtype}."
        )
        plot = f"![Loss over steps, training and held out](loss.png)\n\nEvery step is in {_code(METRICS)}."
        drawn = plot if (folder / "loss.png").exists() else ""
        parts = ["\n".join(table), facts, self._predictions(), drawn, *self._answers()]
        return "\n\n".join(filter(None, parts))

    def _predictions(self) -> str:
        """Of the held-out rows, where they were answered."""
        found = self.figures
        if "predict_samples" not in found:
            return ""
        told = [form.format(found[name]) for name, form in _PREDICTED.items() if name in found]
        return f"{found['predict_samples']:,} held-out rows were answered: {', '.join(told)}."

    def _answers(self) -> Iterator[str]:
        for instruction, before, after in self.answers:
            asked = f"Asked: {_plain(instruction)}" if instruction else "Without a prompt it writes"
            yield f"### A sample\n\n{asked}\n\nBefore:\n\n{_fenced(before)}\n\nAfter:\n\n{_fenced(after)}"

    def _data(self) -> str:
        data, config = self.job.data, self.job.config
        named = "rows bundled with jindo-core" if config.data_path is None else "rows"
        files = ", ".join(_code(name) for name in data.names)
        return (
            f"## What it was trained on\n\n{data.rows:,} {named}, of {files}; SHA-256 of the rows as they were trained "
            f"on (tokens, and which of them count in the loss, in their order):\n{_code(data.chosen.digest())}\n\n"
            f"Prompts are those of the template {_code(by_name(config.prompt_template_name))}, which "
            "jindo-core generate takes from the adapter's folder."
        )

    def _use(self, folder: Path) -> str:
        base, here = _base(self.job.config), folder.resolve().name
        named = [] if self.job.config.base_model is None else ["--base_model", base]
        asks = shlex.join(["jindo-core", "generate", *named, "--lora_weights", here, "--instruction", "..."])
        merges = shlex.join(["jindo-core", "merge", *named, "--lora_weights", here, "--output_dir", f"{here}-merged",
                             "--onto", "original"])  # fmt: skip
        return (
            f"## How to use it\n\n{_fenced(asks, 'sh')}\n\nAs a model of its own, base and adapter in one:\n\n"
            f"{_fenced(merges, 'sh')}{self._peft(here)}"
        )

    def _peft(self, here: str) -> str:
        """Empty where transformers can't read the base as it is: a .gguf file, Meta's layout."""
        config = self.job.config
        base = _hub_base(config)
        if base is None:
            if not (Path(config.base_model or "").expanduser() / "config.json").is_file():
                return ""
            base = _base(config)
        code = (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base, ensure_ascii=False)})\n"
            f"model = PeftModel.from_pretrained(base, {json.dumps(here, ensure_ascii=False)})"
        )
        return f"\n\nWith peft:\n\n{_fenced(code, 'python')}"

    def _settings(self) -> str:
        config = self.job.config
        values, usual = shown(config), _usual(config)
        others = {name: value for name, value in values.items() if getattr(config, name) != usual[name]}
        whole = json.dumps(values, indent=2, ensure_ascii=False)
        return (
            f"## How it was made\n\n{_fenced(self.command, 'sh')}\n\nPaths are relative to where it ran, or their last "
            "part alone where they lay elsewhere. Settings that are not the defaults of the profile "
            f"{config.profile or 'alpaca'}, as they took effect:\n\n{_table(others)}\n\n"
            f"<details>\n<summary>All settings</summary>\n\n{_fenced(whole, 'json')}\n\n</details>"
        )

    def _versions(self) -> str:
        found = [f"jindo-core {__version__}", f"Python {platform.python_version()}"]
        return "Versions: " + ", ".join([*found, *(f"{name} {version(name)}" for name in _ENGINE)]) + "."


def write_card(folder: Path, card: Card, notice: Callable[[str], None]) -> str | None:
    """Write the card into `folder`, whole or not at all: README.md, or RUN.md where that one is somebody's own.

    Returns:
        Its name; None, and a notice: both are somebody's own, or it can't be written.
    """
    try:
        free = [name for name in (CARD, OTHER_CARD) if _is_free(folder / name)]
        if not free:
            notice(f"no run card: {CARD} and {OTHER_CARD} in {folder} are not jindo-core's, and are left alone")
            return None
        write_atomically(folder / free[0], card.text(folder).encode())
    except OSError as error:
        notice(f"the run card in {folder} could not be written ({error.strerror}): the adapter is saved")
        return None
    if free[0] == OTHER_CARD:
        notice(f"{folder / CARD} is not jindo-core's and is left alone: the run card is {OTHER_CARD}")
    return free[0]


def _is_free(path: Path) -> bool:
    """Whether nothing is there, or a card of ours that bears the mark."""
    if not path.exists():
        return not path.is_symlink()
    return path.is_file() and MARK.encode() in path.read_bytes()


# --- the command ------------------------------------------------------------------------------------------


def command_of(config: TrainConfig, explicit: frozenset[str], processes: int = 1) -> str:
    """A command line that gives these settings, in our names: what the user gave, and what else it takes.

    Args:
        config: before anything was changed on account of the model. explicit: names of what the user gave.
    """
    known = settings(TrainConfig)
    given = {name: value for name in known if name in explicit and (value := getattr(config, name)) is not None}
    profile = config.profile or "alpaca"
    if profile == "qlora" and config.lr_scheduler_type == "constant" and (config.warmup_ratio or config.warmup_steps):
        given["lr_scheduler_type"] = "constant_with_warmup"  # what that program's constant never does
    # Others' rules are not run again where all that they decide is given: so a second look adds what they changed.
    for _ in range(2):
        found, _, _ = resolve_train_config(given if _chooses(given) == profile else {"profile": profile, **given})
        for name in known:
            value = getattr(config, name)
            if name != "profile" and value != getattr(found, name) and value is not None:
                given[name] = value
    if _chooses(given) != profile:
        given = {"profile": profile, **given}
    words = ["jindo-core", "train"]
    if processes > 1:
        words = ["torchrun", "--nproc-per-node", str(processes), "-m", "jindo_core", "train"]
    return shlex.join([*words, *(word for name in given for word in _words(known[name], given[name]))])


def _chooses(given: Mapping[str, Any]) -> str:
    """The profile that settings in our names have without being told."""
    return str(given.get("profile") or ("alpaca" if "base_model" in given else "embedded"))


def _words(known: Setting, value: Any) -> list[str]:
    flag = f"--{known.name}"
    if known.kind == "bool":
        return [flag if value else f"--no_{known.name}"]
    if known.kind == "paths":
        return [flag, *map(_typed, value)]
    if isinstance(value, tuple):
        return [flag, ",".join(map(str, value))]
    if known.path or known.name == "prompt_template_name":
        return [flag, _typed(value)]
    return [flag, str(value)]


def _typed(path: str) -> str:
    """A path as it may be shown: relative ones as they were given, others from here, or only their last part."""
    if not os.path.isabs(path):
        return path
    inside = os.path.relpath(path)
    return by_name(path) if inside == "." or inside.startswith("..") else inside


# --- names ------------------------------------------------------------------------------------------------


def _base(config: TrainConfig) -> str:
    return embedded.HUB_ID if config.base_model is None else by_name(config.base_model)


def _hub_base(config: TrainConfig) -> str | None:
    """The base model's id on the Hub; None where it is a folder or file, of which that is not known."""
    name = config.base_model
    if name in (None, embedded.NAME):
        return embedded.HUB_ID
    return name if name is not None and _is_hub_id(name) else None


def _hub_data(path: str) -> str | None:
    if not Path(path).expanduser().exists() and (named := named_dataset(path)) is not None:
        path = named[0]
    if path.startswith(HUB):
        path = "/".join(path.removeprefix(HUB).split("/")[:2])
        return path if _HUB_ID.fullmatch(path) else None
    return path if _is_hub_id(path) else None


def _is_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and looks_like_hub_id(name) and not Path(name).expanduser().exists()


def _usual(config: TrainConfig) -> dict[str, Any]:
    """The defaults of the settings' profile."""
    own = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    return {**own, **PROFILES[config.profile or "alpaca"], "profile": config.profile}


# --- Markdown ---------------------------------------------------------------------------------------------


def _table(values: Mapping[str, Any]) -> str:
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    rows = [f"| {_code(name)} | {_cell(text)} |" for name, text in texts.items()]
    return "\n".join(["| setting | value |", "|---|---|", *rows])


def _cell(text: str) -> str:
    """Text as code in a table's cell, which a | would end even there."""
    return _code(text).replace("|", "\\|")


def _code(text: str) -> str:
    """Text as code in a line, whatever is in it."""
    text = " ".join(text.split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"


def _plain(text: str) -> str:
    """Text in a line that means no Markdown and no HTML."""
    return re.sub(r"([\\`*_{}\[\]<>#|~!&$])", r"\\\1", " ".join(text.split()))


def _fenced(text: str, language: str = "text") -> str:
    """Text in a block that it can't close."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text.strip()}\n{ticks}"
