"""Prompt templates: how a row becomes the text that the model reads and the text that it learns to write.

A template renders a row into segments, and a segment knows what it is. What the loss counts is decided here, before
there is one text: nothing is ever searched for in a rendered row (docs/masks.md).
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jindo_core.data.records import Record, Round
from jindo_core.errors import InputError, nearest

if TYPE_CHECKING:
    from jindo_core.tokenizer import Tokenizer

CHAT = "chat"
"""The name of the tokenizer's own chat template."""
NONE = "none"
"""The name of the template that adds nothing: the instruction is the prompt as it stands."""
BOS, EOS = "{bos}", "{eos}"
"""In a segment of kind template or end: the tokenizer's token that begins or ends a text."""
_FIELD = re.compile(r"\{(instruction|input|system|user|output)\}")
_SUFFIXES = (".yaml", ".yml", ".json")
_SINGLE = {"prompt_input", "prompt_no_input", "response_split"}
# What a template is called elsewhere, as `_plain` makes it, where that is not its name in another spelling.
_ALIASES = {
    "vicuna": "vicuna_v1.1", "llama2": "llama2_chat", "llama3chat": "llama3", "llama3instruct": "llama3",
    "qlora": "qlora_alpaca", "openorca": "orca",
}  # fmt: skip
_CHAT_REQUIRED = {"user_turn", "end"}
_CHAT_TEXTS = _CHAT_REQUIRED | {"begin", "system", "system_turn", "assistant_turn", "answer", "after", "with_input"}
_CHAT_KEYS = _CHAT_TEXTS | {"strip"}
# Key of a chat template -> the fields that it must hold, each once.
_CHAT_FIELDS = {
    "user_turn": ("user",), "system_turn": ("system",), "answer": ("output",), "with_input": ("instruction", "input"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a rendered row.

    kind: "template" and "end" are the template's own words, where the name of a special token is that token; "text"
    and "answer" are the row's, where it is only text. "answer" and "end" are what the model writes: supervised.
    """

    text: str
    kind: Literal["template", "text", "answer", "end"]


class Template(ABC):
    """How rows become segments. Made by `load_template`.

    Attributes:
        name: as it was asked for. description: one line.
        single_turn: made for one instruction and its answer, which are tokenized as one text.
        brings_bos: it says itself where the token that begins a text stands.
    """

    name: str
    description: str
    single_turn: bool
    brings_bos: bool

    def render(self, record: Record, *, open: bool = False) -> list[Segment]:
        """The segments of a row.

        Args:
            open: leave the last answer and its end out: the prompt that the model answers.
        Raises:
            InputError: the template has no place for what the row holds.
        """
        if record.formatted:
            return _formatted(record, open)
        segments = self._render(record, open)
        # A row ends with its end token: what follows an answer's end is there for the next round.
        while segments and segments[-1].kind == "template" and not open:
            segments.pop()
        return segments

    @abstractmethod
    def _render(self, record: Record, open: bool) -> list[Segment]:
        """The segments of a row that is not formatted yet."""

    @abstractmethod
    def identity(self) -> str:
        """All that the segments depend on, for a digest."""


@dataclass(frozen=True)
class SingleTurnTemplate(Template):
    """alpaca-lora's form: a prompt, directly followed by the answer.

    prompt_input and prompt_no_input hold {instruction} (and {input}); any other brace but {bos} and {eos} is itself.
    response_split is the text between a prompt and its answer. In a conversation every round is a prompt and an answer
    with its EOS; what stands before the header of the instruction comes once. answer: what the model writes, holds
    {output}.
    """

    name: str
    description: str
    prompt_input: str
    prompt_no_input: str
    response_split: str
    answer: str = "{output}"

    single_turn = True

    @property
    def brings_bos(self) -> bool:  # type: ignore[override]
        return BOS in self.prompt_input + self.prompt_no_input

    def prompt(self, instruction: str, input: str | None = None) -> str:
        """The prompt of a row as text. An empty input is no input.

        Both fields are filled in one pass, so text of theirs that looks like a field stays as it is.
        """
        values = {"instruction": instruction, "input": input or ""}
        text = self.prompt_input if input else self.prompt_no_input
        return _FIELD.sub(lambda match: values.get(match[1], match[0]), text)

    def response(self, text: str) -> str:
        """What follows the last response_split in `text`, stripped; all of it, stripped, where there is none."""
        return text.rpartition(self.response_split)[2].strip()

    def _render(self, record: Record, open: bool) -> list[Segment]:
        if record.system:
            raise InputError(
                f"row {record.row} has a system message, for which template {self.name} has no place: "
                f"expected one such as {', '.join(_with_system())}"
            )
        segments: list[Segment] = []
        for number, turn in enumerate(record.rounds):
            pattern = self.prompt_input if turn.input else self.prompt_no_input
            if number:
                pattern = pattern[_preamble(pattern) :]
            segments += _fill(pattern, {"instruction": turn.instruction, "input": turn.input})
            if not open or number + 1 < len(record.rounds):
                segments += [Segment(_answer(self.answer, turn.output), "answer"), Segment(EOS, "end")]
        return segments

    def identity(self) -> str:
        return repr((self.prompt_input, self.prompt_no_input, self.answer))


@dataclass(frozen=True)
class ChatTemplate(Template):
    """A conversation, turn by turn. Keys of its file:

    user_turn: holds {user}, and perhaps {system}: there the first round's system_turn goes, which else stands before
    it. assistant_turn: what asks for the answer. answer: what the model writes, holds {output}. end: what ends it,
    supervised too: {eos} or a special token's text. after: what stands behind that. with_input: how instruction and
    input become {user}. begin: what a conversation begins with. system: the message where a row brings none.
    strip: white space round the row's texts is left out.
    """

    name: str
    description: str
    user_turn: str
    end: str
    begin: str = ""
    system: str = ""
    system_turn: str = ""
    assistant_turn: str = ""
    answer: str = "{output}"
    after: str = ""
    with_input: str = "{instruction}\n\n{input}"
    strip: bool = False

    single_turn = False

    @property
    def brings_bos(self) -> bool:  # type: ignore[override]
        return any(BOS in text for text in (self.begin, self.system_turn, self.user_turn))

    def _render(self, record: Record, open: bool) -> list[Segment]:
        system = self._system(record)
        segments = [Segment(self.begin, "template")]
        if "{system}" not in self.user_turn:
            segments += system
        for number, turn in enumerate(record.rounds):
            for piece in _pieces(self.user_turn):
                if piece == "{user}":
                    segments += self._user(turn)
                elif piece == "{system}":
                    segments += [] if number else system
                else:
                    segments.append(Segment(piece, "template"))
            segments.append(Segment(self.assistant_turn, "template"))
            if not open or number + 1 < len(record.rounds):
                segments += [
                    Segment(_answer(self.answer, self._own(turn.output)), "answer"),
                    Segment(self.end, "end"),
                    Segment(self.after, "template"),
                ]
        return [segment for segment in segments if segment.text]

    def _own(self, text: str) -> str:
        return text.strip() if self.strip else text

    def _system(self, record: Record) -> list[Segment]:
        text = self._own(record.system or self.system)
        if not text:
            return []
        if not self.system_turn:
            raise InputError(
                f"row {record.row} has a system message, for which template {self.name} has no place: give the "
                "template a system_turn"
            )
        return _fill(self.system_turn, {"system": text})

    def _user(self, turn: Round) -> list[Segment]:
        if not turn.input:
            return [Segment(self._own(turn.instruction), "text")]
        values = {"instruction": self._own(turn.instruction), "input": self._own(turn.input)}
        return _fill(self.with_input, values)

    def identity(self) -> str:
        return repr([getattr(self, key) for key in sorted(_CHAT_KEYS)])


def template_names() -> list[str]:
    """Names of the templates that come with the package."""
    folder = files("jindo_core.data") / "templates"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_template(name_or_path: str | Path, tokenizer: Tokenizer | None = None) -> Template:
    """A template of the package by name, or the user's own from a .yaml, .yml or .json file.

    The file holds prompt_input, prompt_no_input and response_split, the form of alpaca-lora's templates, and perhaps
    answer; or the keys of a `ChatTemplate`; and a description if it likes. "chat" is the tokenizer's own chat
    template. A name may be spelt with other cases and separators: "llama-2-chat".

    Raises:
        InputError: no such name or file, a file that is no template, or "chat" of a tokenizer that has none.
    """
    text = str(name_or_path)
    if text == CHAT:
        from jindo_core.data.chat_template import own_template

        return own_template(tokenizer)
    if (name := _named(text)) is not None:
        return _read(name, Path(str(files("jindo_core.data") / "templates" / f"{name}.yaml")))
    path = Path(text).expanduser()
    if path.suffix.lower() not in _SUFFIXES:
        names = [CHAT, *template_names()]
        raise InputError(
            f"prompt template {text!r} is unknown: expected {', '.join(names)}, or a .yaml or .json file."
            + nearest(text, names)
        )
    if not path.is_file():
        raise InputError(f"prompt template file {text} does not exist: expected a .yaml or .json file")
    return _read(path.stem, path)


def _named(text: str) -> str | None:
    """The package's template of that name, however it is spelt."""
    names = template_names()
    return text if text in names else {**_ALIASES, **{_plain(name): name for name in names}}.get(_plain(text))


def _plain(name: str) -> str:
    return re.sub(r"[-_.\s]", "", name).lower()


# --- from a row to segments -----------------------------------------------------------------------------


def _formatted(record: Record, open: bool) -> list[Segment]:
    """Rounds whose instructions are prompts already."""
    segments: list[Segment] = []
    for number, turn in enumerate(record.rounds):
        segments.append(Segment(turn.instruction, "text"))
        if not open or number + 1 < len(record.rounds):
            segments += [Segment(turn.output, "answer"), Segment(EOS, "end")]
    return segments


def _pieces(pattern: str) -> list[str]:
    """The pattern cut at its fields, which are pieces of their own."""
    cut = _FIELD.split(pattern)
    return [piece if number % 2 == 0 else f"{{{piece}}}" for number, piece in enumerate(cut) if piece]


def _fill(pattern: str, values: dict[str, str]) -> list[Segment]:
    """The pattern with the row's texts in place of its fields, one pass: a field inside a text is text."""
    segments = []
    for piece in _pieces(pattern):
        field = piece[1:-1]
        if piece.startswith("{") and field in values:
            segments.append(Segment(values[field], "text"))
        else:
            segments.append(Segment(piece, "template"))
    return segments


def _answer(pattern: str, output: str) -> str:
    return pattern.replace("{output}", output, 1)


def _preamble(pattern: str) -> int:
    """Characters of a prompt before the header of its instruction: up to the last empty line before that field."""
    head = pattern[: pattern.index("{instruction}")]
    return head.rfind("\n\n") + 2 if "\n\n" in head else 0


# --- from a file to a template --------------------------------------------------------------------------


def _with_system() -> list[str]:
    return [name for name in ("orca", "vicuna_v1.1", "llama2_chat", "llama3", "chatml") if name in template_names()]


def _read(name: str, path: Path) -> Template:
    raw = _parse(path)
    if not isinstance(raw, dict):
        raise InputError(f"prompt template {path} is a {type(raw).__name__}, expected keys and values")
    chat = bool(_CHAT_KEYS & raw.keys()) and not _SINGLE & raw.keys()
    required, known = (_CHAT_REQUIRED, _CHAT_KEYS) if chat else (_SINGLE, _SINGLE | {"answer"})
    for key in sorted(required - raw.keys()):
        raise InputError(f"prompt template {path} lacks {key}: expected {', '.join(sorted(required))}")
    for key in raw:
        if key not in known | {"description"}:
            raise InputError(f"prompt template {path} has an unknown key {key!r}.{nearest(str(key), known)}")
        if key == "strip":
            if not isinstance(raw[key], bool):
                raise InputError(f"prompt template {path}: strip is {raw[key]!r}, expected true or false")
        elif not isinstance(raw[key], str):
            raise InputError(f"prompt template {path}: {key} is {raw[key]!r}, expected text")
    return _chat(name, path, raw) if chat else _single(name, path, raw)


def _single(name: str, path: Path, raw: dict[str, str]) -> SingleTurnTemplate:
    for key, fields in (("prompt_input", {"instruction", "input"}), ("prompt_no_input", {"instruction"})):
        found = set(_FIELD.findall(raw[key])) & {"instruction", "input"}
        if found != fields:
            wanted = " and ".join(f"{{{field}}}" for field in sorted(fields, reverse=True))
            held = " and ".join(f"{{{field}}}" for field in sorted(found, reverse=True)) or "no field"
            raise InputError(f"prompt template {path}: {key} holds {held}, expected {wanted}")
    if _FIELD.findall(raw.get("answer", "{output}")) != ["output"]:
        raise InputError(f"prompt template {path}: answer is {raw['answer']!r}, expected {{output}} in it once")
    if not raw["response_split"].strip():
        raise InputError(f"prompt template {path}: response_split is empty, expected the text before an answer")
    return SingleTurnTemplate(
        name,
        raw.get("description", ""),
        raw["prompt_input"],
        raw["prompt_no_input"],
        raw["response_split"],
        raw.get("answer", "{output}"),
    )


def _chat(name: str, path: Path, raw: dict[str, Any]) -> ChatTemplate:
    for key in sorted(_CHAT_TEXTS & raw.keys()):
        found: Sequence[str] = _FIELD.findall(raw[key])
        wanted = _CHAT_FIELDS.get(key, ())
        allowed = (*wanted, "system") if key == "user_turn" else wanted
        if any(found.count(field) != 1 for field in wanted) or not set(found) <= set(allowed) or (
            len(set(found)) < len(found)
        ):
            held = " and ".join(f"{{{field}}}" for field in found) or "no field"
            expected = " and ".join(f"{{{field}}} once" for field in wanted) or "none"
            raise InputError(f"prompt template {path}: {key} holds {held}, expected {expected}")
    if not raw["end"].strip():
        raise InputError(f"prompt template {path}: end is empty, expected {EOS} or a special token's text")
    if not raw.get("system_turn") and (raw.get("system") or "{system}" in raw["user_turn"]):
        raise InputError(f"prompt template {path} lacks system_turn: expected how the system message is put")
    return ChatTemplate(name, **{"description": "", **raw})


def _parse(path: Path) -> Any:
    import yaml

    try:
        text = path.read_bytes().decode("utf-8-sig")
        return json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise InputError(f"prompt template {path} is no UTF-8 (byte {error.start}): save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise InputError(f"prompt template {path}, line {error.lineno}: broken JSON ({error.msg})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or type(error).__name__
        raise InputError(f"prompt template {path}{where}: broken YAML ({problem})") from error
