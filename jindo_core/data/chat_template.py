"""A tokenizer's own chat template (Jinja) as segments.

The template is rendered once for each shape of conversation, with sentinels in place of the contents; what stands
between them is its skeleton. A row's contents put into the skeleton must give what the template itself renders, row
by row, or the row is refused: a mask that is nearly right teaches the wrong thing.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jindo_core.data.records import Record
from jindo_core.data.templates import CHAT, Segment, Template
from jindo_core.errors import InputError

if TYPE_CHECKING:
    from jindo_core.tokenizer import Tokenizer

_WRITE_ONE = "write the form as a template file instead (docs/masks.md)"
# Private-use characters, which no template looks at, and a space that Python and Jinja strip and no template writes.
_OPEN, _CLOSE, _SPACE = "\ue000", "\ue001", "\u2003"


@dataclass(frozen=True, slots=True)
class _Skeleton:
    """gaps: the template's own text before, between and after the contents. strips: of each content, whether the
    template takes white space off its left and its right. layout: for each gap its segments."""

    gaps: list[str]
    strips: list[tuple[bool, bool]]
    layout: list[list[Segment]]


class JinjaTemplate(Template):
    """The form of conversations that a model was published with. Instruction and input are a user's one message."""

    name = CHAT
    description = "The tokenizer's own chat template."
    single_turn = False
    brings_bos = True  # transformers adds no token to what such a template renders

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        self._source = source
        self._texts = dict(tokenizer.special_texts)
        self._jinja = _compile(source)
        self._skeletons: dict[tuple[bool, int, bool], _Skeleton] = {}
        names = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def identity(self) -> str:
        return repr((self._source, sorted(self._texts.items())))

    def _render(self, record: Record, open: bool) -> list[Segment]:
        messages = _messages(record, open)
        skeleton = self._skeleton(bool(record.system), len(record.rounds), open)
        segments = list(skeleton.layout[0])
        for message, (left, right), gap in zip(messages, skeleton.strips, skeleton.layout[1:], strict=True):
            text = message["content"]
            text = text.lstrip() if left else text
            text = text.rstrip() if right else text
            segments.append(Segment(text, "answer" if message["role"] == "assistant" else "text"))
            segments += gap
        if "".join(segment.text for segment in segments) != self._text(messages, open, f"row {record.row}: "):
            raise InputError(
                f"row {record.row}: the tokenizer's chat template changes what a message says, "
                f"so that its answers can't be told apart: {_WRITE_ONE}"
            )
        return [segment for segment in segments if segment.text]

    def _text(self, messages: list[dict[str, str]], open: bool, where: str = "") -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self._jinja.render(
                    messages=messages, add_generation_prompt=open, tools=None, documents=None, **self._texts
                )
            )
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{where}the tokenizer's chat template refuses the conversation ({said})") from error

    def _skeleton(self, system: bool, rounds: int, open: bool) -> _Skeleton:
        key = (system, rounds, open)
        if key not in self._skeletons:
            gaps, strips = self._gaps(system, rounds, open)
            asked = gaps[-1] if open else self._gaps(system, 1, True)[0][-1]
            roles = [message["role"] for message in _shape(system, rounds, open)]
            self._skeletons[key] = _Skeleton(gaps, strips, self._layout(gaps, roles, asked))
        return self._skeletons[key]

    def _gaps(self, system: bool, rounds: int, open: bool) -> tuple[list[str], list[tuple[bool, bool]]]:
        messages = _shape(system, rounds, open)
        rest = self._text(messages, open)
        gaps, strips = [], []
        for message in messages:
            content = message["content"].strip(_SPACE)
            gap, found, rest = rest.partition(content)
            if not found or content in rest:
                raise InputError(
                    f"the tokenizer's chat template does not show a {message['role']}'s message just once, in its "
                    f"place: {_WRITE_ONE}"
                )
            gaps.append(gap.removesuffix(_SPACE))
            strips.append((not gap.endswith(_SPACE), not rest.startswith(_SPACE)))
            rest = rest.removeprefix(_SPACE)
        return [*gaps, rest], strips

    def _layout(self, gaps: list[str], roles: list[str], asked: str) -> list[list[Segment]]:
        """Each gap's segments.

        asked: what the template puts behind a user's message for a model to answer. What stands between that and
        the answer in a whole conversation (LLaMA 2's space) the model must write itself: it belongs to the answer.
        """
        layout, end = [], ""
        if roles[-1] == "assistant":
            last = self._special.search(gaps[-1])
            if last is None:
                raise InputError(f"the tokenizer's chat template ends an answer with no special token: {_WRITE_ONE}")
            end = gaps[-1][: last.end()]
        elif "assistant" in roles:  # a prompt after earlier rounds: those ended as every other conversation's
            after = gaps[roles.index("assistant") + 1]
            found = self._special.search(after)
            end = after[: found.end()] if found else ""
        for number, gap in enumerate(gaps):
            segments: list[Segment] = []
            if number and roles[number - 1] == "assistant":
                if not end or not gap.startswith(end):
                    raise InputError(
                        f"the tokenizer's chat template does not end every answer with one token: {_WRITE_ONE}"
                    )
                segments.append(Segment(end, "end"))
                gap = gap.removeprefix(end)
            written = ""
            if number < len(roles) and roles[number] == "assistant" and gap.startswith(asked):
                gap, written = asked, gap.removeprefix(asked)
            segments.append(Segment(gap, "template"))
            # Its special tokens, if it has any, are special: the kind that is supervised and not escaped.
            segments.append(Segment(written, "end" if self._special.search(written) else "answer"))
            layout.append(segments)
        return layout


def own_template(tokenizer: Tokenizer | None) -> JinjaTemplate:
    """The chat template that a tokenizer brings along.

    Raises:
        InputError: there is no tokenizer, it has no template, or one that is no Jinja.
    """
    if tokenizer is None:
        raise InputError(f"prompt template {CHAT!r} is the tokenizer's own: expected a model to take it from")
    if tokenizer.chat_template is None:
        raise InputError(
            f"prompt template {CHAT!r}: this model's tokenizer brings no chat template; name one of the package's, "
            "or a .yaml file"
        )
    return JinjaTemplate(tokenizer.chat_template, tokenizer)


def _messages(record: Record, open: bool) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": record.system}] if record.system else []
    for number, turn in enumerate(record.rounds):
        user = f"{turn.instruction}\n\n{turn.input}" if turn.input else turn.instruction
        messages.append({"role": "user", "content": user})
        if not open or number + 1 < len(record.rounds):
            messages.append({"role": "assistant", "content": turn.output})
    return messages


def _shape(system: bool, rounds: int, open: bool) -> list[dict[str, str]]:
    """The messages of such a conversation, each a sentinel in white space."""
    roles = (["system"] if system else []) + ["user", "assistant"] * rounds
    return [
        {"role": role, "content": f"{_SPACE}{_OPEN}{number}{_CLOSE}{_SPACE}"}
        for number, role in enumerate(roles[: -1 if open else None])
    ]


def _compile(source: str) -> Any:
    """The template in the environment that transformers renders chat templates in, but without a clock.

    A template that writes today's date would make the same row's ids differ from day to day; those that ask whether
    there is a clock fall back to a date of their own.
    """
    from jinja2 import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks answers for transformers; here the text between the two marks."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, **settings: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **settings)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(source)
    except TemplateError as error:
        said = str(error).splitlines()[0]
        raise InputError(f"the tokenizer's chat template is no Jinja ({said}): {_WRITE_ONE}") from error
