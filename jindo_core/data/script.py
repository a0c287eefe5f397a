"""From a template's segments to what the tokenizer is asked: runs of text, and special tokens between them."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from jindo_core.data.records import Record, Round
from jindo_core.data.templates import BOS, EOS, Segment, Template
from jindo_core.errors import InputError

if TYPE_CHECKING:
    from jindo_core.tokenizer import SpecialToken, Tokenizer

LEARNED = ("answer", "end")
"""Kinds of segments that the loss counts."""
# White space as the tokenizers library has it (Rust's \s): Python's takes U+001C to U+001F along.
_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
_SPACE += "\u2028\u2029\u202f\u205f\u3000"


@dataclass(slots=True)
class Part:
    """A run of text, or a special token (no text). Filled by `Script.tokenize`.

    spans: where, in characters, the text is an answer. opens: no special token stands before it in its row. own: a
    token that holds words before an answer as well, and not just white space, is none of the answer's.
    """

    text: str = ""
    spans: list[tuple[int, int]] = field(default_factory=list)
    opens: bool = True
    own: bool = False
    ids: list[int] = field(default_factory=list)
    learned: list[bool] = field(default_factory=list)

    @property
    def is_mixed(self) -> bool:
        """Whether some of the text is an answer, and some is not."""
        return bool(self.spans) and self.spans != [(0, len(self.text))]


class Script:
    """What a tokenizer makes of a template's segments."""

    def __init__(self, tokenizer: Tokenizer, template: Template) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._cuts: dict[str, list[str | SpecialToken]] = {}

    def bos(self, record: Record) -> list[int]:
        """BOS, where the tokenizer adds one and the template does not bring it itself."""
        brings = self._template.brings_bos and not record.formatted
        return [self._tokenizer.bos_id] if self._tokenizer.adds_bos and not brings else []  # type: ignore[list-item]

    def require_end(self) -> frozenset[int]:
        """The tokens that end an answer.

        Raises:
            InputError: the template's end holds no special token of this tokenizer: nothing would ever stop.
        """
        segments = self._template.render(Record((Round("?", "", "!"),)))
        ends = [segment.text for segment in segments if segment.kind == "end"]
        tokens = [piece for text in ends for piece in self._cut(text) if not isinstance(piece, str)]
        if not tokens and (self._tokenizer.eos_id is not None or EOS not in "".join(ends)):
            known = ", ".join(list(self._tokenizer.special_tokens)[:8]) or "none"
            raise InputError(
                f"template {self._template.name} ends an answer with {ends[-1]!r}, which is no special token of this "
                f"model (it has {known}): choose another template, or a file whose end is {EOS}"
            )
        return frozenset(token.id for token in tokens)

    def parts(self, segments: Iterable[Segment], *, learned: bool = True) -> list[Part]:
        """Runs of text as long as no special token of the template's own comes between.

        Args:
            learned: False: nobody asks which tokens of a run are an answer's, which saves finding out.
        """
        run = _Run()
        for segment in segments:
            counts = learned and segment.kind in LEARNED
            own = segment.kind in ("template", "end")
            for piece in self._cut(segment.text) if own else [segment.text]:
                if isinstance(piece, str):
                    run.add(piece, counts)
                else:
                    run.close(piece)
                    run.parts.append(Part(opens=False, ids=[piece.id], learned=[counts]))
        run.close(None)
        return run.parts

    def tokenize(self, parts: Sequence[Part]) -> None:
        """Fill in the parts' ids, all in as few calls as can be.

        Only a run that is partly an answer is asked for its tokens' places: that takes several times as long.
        """
        for opens in (True, False):
            texts = [part for part in parts if part.text and part.opens == opens]
            mixed = [part for part in texts if part.is_mixed]
            whole = [part for part in texts if not part.is_mixed]
            batch = self._tokenizer.encode_batch([part.text for part in whole], opens=opens)
            for part, ids in zip(whole, batch, strict=True):
                part.ids, part.learned = ids, [bool(part.spans)] * len(ids)
            found = self._tokenizer.encode_spans([part.text for part in mixed], opens=opens)
            for part, (ids, last) in zip(mixed, found, strict=True):
                part.ids, part.learned = ids, [False] * len(ids)
                for start, end in part.spans:
                    # Places never fall: tokens stand in their text's order.
                    first, stop = bisect_left(last, start), bisect_left(last, end)
                    if part.own and (last[first - 1] + 1 if first else 0) < len(part.text[:start].rstrip()):
                        first = min(first + 1, stop)
                    part.learned[first:stop] = [True] * (stop - first)

    def _cut(self, text: str) -> list[str | SpecialToken]:
        """A template's own text, cut at its special tokens."""
        if text not in self._cuts:
            pieces = (self._tokens.get(piece, piece) for piece in self._names.split(text) if piece)
            self._cuts[text] = [piece for piece in pieces if piece is not None]
        return self._cuts[text]

    @cached_property
    def _tokens(self) -> dict[str, SpecialToken | None]:
        from jindo_core.tokenizer import SpecialToken

        tokens: dict[str, SpecialToken | None] = dict(self._tokenizer.special_tokens)
        by_id = {token.id: token for token in self._tokenizer.special_tokens.values()}
        for name, token in ((BOS, self._tokenizer.bos_id), (EOS, self._tokenizer.eos_id)):
            tokens[name] = None if token is None else by_id.get(token, SpecialToken(token))
        return tokens

    @cached_property
    def _names(self) -> re.Pattern[str]:
        names = sorted(self._tokens, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names))})")


class _Run:
    """Collects text until a special token ends it."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self._texts: list[str] = []
        self._spans: list[tuple[int, int]] = []
        self._length = 0
        self._before: SpecialToken | None = None

    def add(self, text: str, counts: bool) -> None:
        if counts and text:
            start = self._length
            if self._spans and self._spans[-1][1] == start:
                start = self._spans.pop()[0]
            self._spans.append((start, self._length + len(text)))
        self._texts.append(text)
        self._length += len(text)

    def close(self, token: SpecialToken | None) -> None:
        """End the run before `token`. White space that a special token takes along is not encoded."""
        text = "".join(self._texts)
        left, right = 0, len(text)
        if self._before is not None and self._before.takes_right:
            left = len(text) - len(text.lstrip(_SPACE))
        if token is not None and token.takes_left:
            right = len(text.rstrip(_SPACE))
        if left < right:
            spans = [(max(start, left) - left, min(end, right) - left) for start, end in self._spans]
            spans = [(start, end) for start, end in spans if start < end]
            self.parts.append(Part(text[left:right], spans, opens=not self.parts))
        self._texts, self._spans, self._length, self._before = [], [], 0, token
