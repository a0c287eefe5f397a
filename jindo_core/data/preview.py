"""Rows as the model will see them: decoded token by token, what is learned in colour or between brackets."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from itertools import chain, groupby, islice, repeat
from typing import TYPE_CHECKING

from jindo_core.data.examples import IGNORE, Encoder, Layout
from jindo_core.data.records import Record
from jindo_core.tokenizer import REPLACEMENT

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from jindo_core.tokenizer import Tokenizer

_MARKS = "⟦", "⟧"
# Two shades each, so that neighbouring tokens can be told apart.
_LEARNED, _MASKED = ("black on green", "black on bright_green"), ("white on grey19", "white on grey30")
_SPECIAL = "bold magenta"


def preview(
    records: Iterable[Record], encoder: Encoder, tokenizer: Tokenizer, n: int, console: Console,
    files: Iterable[str] = (),
) -> None:  # fmt: skip
    """Show the first `n` rows: every token, which of them the loss counts, special tokens by name, what was cut.

    In a terminal with colours learned tokens are green; elsewhere they stand between ⟦ and ⟧.

    Args:
        files: the file of each record, said where there is one.
    Raises:
        InputError: a row that the template has no place for.
    """
    from rich.text import Text

    colour = console.color_system is not None and console.is_terminal
    shown = encoder.lay_out(list(islice(records, max(n, 0))))
    if shown:
        key = Text("learned", style=_LEARNED[0]) if colour else Text("{}learned{}".format(*_MARKS))
        console.print(Text("Rows as the model sees them; ") + key + Text(" is what the loss counts.\n"))
    for layout, file in zip(shown, chain(files, repeat("")), strict=False):
        where = f"{file}, " if file else ""
        console.print(Text(f"── {where}{_heading(layout, encoder.limit)}", style="bold"), soft_wrap=True)
        console.print(_row(layout, tokenizer, colour), soft_wrap=True)
        console.print()


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds. A special token's is its name; the text of a character whose bytes are several
    tokens is the last one's; bytes that never become a character are U+FFFD."""
    special = {token.id: name for name, token in tokenizer.special_tokens.items()}
    for token in (tokenizer.bos_id, tokenizer.eos_id):
        if token is not None:
            special.setdefault(token, tokenizer.piece(token))
    texts: list[str] = []
    for is_special, group in groupby(ids, key=lambda token: token in special):
        run = list(group)
        texts += [special[token] for token in run] if is_special else _run_texts(tokenizer, run)
    return texts


def _run_texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    texts: list[str] = []
    # Decoded behind the character before it: SentencePiece takes the space off the first word that it is given.
    before = sent = begin = 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[before:end])
        if text.endswith(REPLACEMENT) and end < len(ids):
            texts.append("")
            continue
        texts.append(text[sent:])
        before, begin = begin, end
        sent = len(tokenizer.decode(ids[before:end]))
    return texts


def _heading(layout: Layout, limit: str) -> str:
    ids, labels = layout.example.input_ids, layout.example.labels
    learned = sum(label != IGNORE for label in labels[1:])
    said = [f"row {layout.row}: {len(ids)} tokens, {learned} learned"]
    if layout.cut_prompt:
        said.append(f"{layout.cut_prompt} of the prompt cut")
    if layout.cut_end:
        said.append(f"{layout.cut_end} cut at the end, EOS with them")
    if layout.cut_prompt or layout.cut_end:
        said.append(limit)
    if not layout.learns:
        said.append("left out: nothing to learn")
    return "; ".join(said)


def _row(layout: Layout, tokenizer: Tokenizer, colour: bool) -> Text:
    from rich.text import Text

    row, inside, shade = Text(), False, 0
    ids, labels = layout.example.input_ids, layout.example.labels
    special = {token.id for token in tokenizer.special_tokens.values()} | {tokenizer.bos_id, tokenizer.eos_id}
    for token, label, text in zip(ids, labels, token_texts(tokenizer, ids), strict=True):
        learned = label != IGNORE
        if learned != inside and not colour:
            row.append(_MARKS[0] if learned else _MARKS[1])
        inside = learned
        if not text:
            continue  # its character ends in a later token
        style = f"{_SPECIAL} on {(_LEARNED if learned else _MASKED)[shade].split()[-1]}" if token in special else (
            (_LEARNED if learned else _MASKED)[shade]
        )
        shade = 1 - shade
        row.append(_visible(text), style if colour else "")
    if inside and not colour:
        row.append(_MARKS[1])
    return row


def _visible(text: str) -> str:
    """Control and format characters by their code: a terminal would obey the ones and hide the others."""
    return "".join(
        "⏎\n" if char == "\n" else "⇥\t" if char == "\t"
        else f"<U+{ord(char):04X}>" if unicodedata.category(char) in ("Cc", "Cf", "Co", "Zl", "Zp") else char
        for char in text
    )  # fmt: skip
