"""Perplexity of a text file under a sliding window, per token and per byte.

Windows of `window` tokens begin every `stride` tokens; of each, the tokens that no earlier window held are predicted,
so that a token has at least window - stride tokens before it (transformers' documentation, "Perplexity of fixed-length
models"). The text's first token is given, not predicted, unless the tokenizer puts BOS before it.

    perplexity = exp(-sum log p / tokens),    bits per byte = -sum log p / (bytes ln 2)

The mean is over predicted tokens, each once. The documentation's loop weighs every window by one token less than it
predicts, of which the first alone is right; with few windows or short strides its figure is off by a percent.

The text is tokenized a block at a time. Where it is parted, no token may lie across the seam: that is checked on the
text around each, so that the ids are those of the whole text.
"""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from jindo_core.errors import InputError
from jindo_core.likelihood import Request, Score
from jindo_core.tokenizer import Tokenizer

WINDOW = 2048
"""Of a model whose context is longer, unless another is asked for."""

_BLOCK = 1 << 16  # characters
_AROUND = 256  # characters on either side of a seam that are tokenized to see that it is one
# A line's start, else a word's: where tokenizers part text anyway.
_SEAMS = (re.compile(r"(?<=\n)(?=\S)"), re.compile(r"(?<=\S)(?= \S)"))
_TRIES = 32


class TextTokens:
    """A UTF-8 text file's ids, in bounded memory; iterated, (ids, the text they are of) a piece at a time.

    Attributes:
        bytes_read: of the file, so far.
    """

    def __init__(self, file: Path, tokenizer: Tokenizer, block: int = _BLOCK) -> None:
        self.bytes_read = 0
        self._file, self._tokenizer, self._block = file, tokenizer, block

    def __iter__(self) -> Iterator[tuple[list[int], str]]:
        """Raises InputError: the file can't be read, is no UTF-8, or can't be parted as the seams around let expect."""
        self.bytes_read = 0
        held, before, wanted = "", "", self._block
        for text in self._read():
            held += text
            if len(held) < wanted:
                continue
            cut = self._seam(before, held)
            if cut is None:
                wanted = 2 * len(held)  # no place to part it: look again when there is more
                continue
            yield self._ids(before, held[:cut]), held[:cut]
            before, held, wanted = held[max(cut - _AROUND, 0) : cut], held[cut:], self._block
        if held:
            yield self._ids(before, held), held

    def _read(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        try:
            with self._file.open("rb") as file:
                while data := file.read(self._block):
                    yield decoder.decode(data)
                    self.bytes_read += len(data)
            yield decoder.decode(b"", final=True)
        except OSError as error:
            raise InputError(f"{self._file}: got '{error.strerror}', expected a readable text file") from None
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self._file}: got bytes that are no UTF-8 behind byte {self.bytes_read}: convert it first"
            ) from error

    def _seam(self, before: str, held: str) -> int | None:
        """The last place within `held` where no token crosses, with enough text behind it to see that."""
        end = len(held) - _AROUND
        for kind in _SEAMS:
            places = [match.start() for match in kind.finditer(held, len(held) // 2, max(end, 0))]
            for cut in reversed(places[-_TRIES:]):
                left = (before + held[:cut])[-_AROUND:]
                alone = self._tokenizer.encode(left, bos=False)
                if self._tokenizer.encode(left + held[cut : cut + _AROUND], bos=False)[: len(alone)] == alone:
                    return cut
        return None

    def _ids(self, before: str, piece: str) -> list[int]:
        if not before:
            return self._tokenizer.encode(piece)
        alone = self._tokenizer.encode(before, bos=False)
        ids = self._tokenizer.encode(before + piece, bos=False)
        if ids[: len(alone)] != alone:
            raise InputError(
                f"{self._file}: its tokens can't be told a piece at a time before byte {self.bytes_read}: "
                "expected lines or words; measure a shorter part of it"
            )
        return ids[len(alone) :]


class Windows:
    """The requests of a text, one for each window; iterated once.

    Args:
        window: tokens in one. stride: tokens from one to the next, at most `window`; where it is `window`, the first
            token of each has nothing before it and is not predicted.
        limit: so many windows at most.
    """

    def __init__(self, text: TextTokens, tokenizer: Tokenizer, window: int, stride: int, limit: int | None) -> None:
        self.text = text
        self._tokenizer = tokenizer
        self._window, self._stride, self._limit = window, stride, limit
        self._read = self._end = 0  # tokens of the pieces read, and those that windows have covered
        self._bytes = 0  # of the pieces read
        self._latest: tuple[list[int], str] = ([], "")

    def __iter__(self) -> Iterator[Request]:
        pieces = iter(self.text)
        held: list[int] = []  # tokens from `begin` on
        begin, made = 0, 0
        while self._limit is None or made < self._limit:
            while len(held) < self._window and (piece := next(pieces, None)) is not None:
                held += piece[0]
                self._latest = piece
                self._read += len(piece[0])
                self._bytes += len(piece[1].encode())
            end = begin + min(len(held), self._window)
            if not held or end == self._end:
                return
            # What has no token before it in its window is given, not predicted.
            known = max(self._end - begin, 1)
            self._end = end
            if end - begin > known:
                yield Request(tuple(held[:known]), tuple(held[known : end - begin]))
                made += 1
            begin += self._stride
            del held[: self._stride]

    @property
    def bytes_covered(self) -> int:
        """UTF-8 bytes of the text in all windows so far; of a piece that is in them partly, as its ids decode."""
        ids, text = self._latest
        rest = self._read - self._end
        if not rest:
            return self._bytes
        return self._bytes - len(text.encode()) + len(self._tokenizer.decode(ids[:-rest]).encode())


def measures(windows: Windows, requests: Sequence[tuple[int, Score]]) -> dict[str, float]:
    """Perplexity and what it is made of.

    Args:
        requests: of each window, the tokens predicted and their score.
    """
    tokens = sum(count for count, _ in requests)
    nats = -math.fsum(score.log_probability for _, score in requests)
    size = windows.bytes_covered
    return {
        "perplexity": _exp(nats / tokens),
        "nats_per_token": nats / tokens,
        "byte_perplexity": _exp(nats / size),
        "bits_per_byte": nats / size / math.log(2),
        "tokens": tokens,
        "bytes": size,
        "n": len(requests),
    }


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def choose_window(context: int | None, window: int | None, stride: int | None) -> tuple[int, int]:
    """What is left out: a window of the model's context, `WINDOW` at most, and half a window between two.

    Raises:
        InputError: a window longer than the context, or a stride longer than the window.
    """
    length = window or min(context or WINDOW, WINDOW)
    if context is not None and length > context:
        raise InputError(f"--window: got {length}, expected at most the model's context of {context} tokens")
    step = stride or max(length // 2, 1)
    if step > length:
        raise InputError(f"--stride: got {step}, expected at most the window of {length} tokens")
    return length, step
