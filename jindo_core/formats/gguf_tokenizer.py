"""A model's tokenizer as llama.cpp keeps it: `tokenizer.*` entries of a GGUF file.

SentencePiece's BPE becomes llama.cpp's "llama" vocabulary (pieces with scores), byte-level BPE its "gpt2" (tokens with
merges, and the name of the rule that splits text before the merges). A rule it has no name for is refused: with another
one, text would be cut into other tokens.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jindo_core.errors import InputError
from jindo_core.files import read_json
from jindo_core.tokenizer import load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens; SentencePiece's numbers, which llama.cpp took over."""

_SENTENCEPIECE_BPE = 2

# How a tokenizer.json splits text before its merges -> llama.cpp's name for it.
_DIGITS_3 = r"\p{N}{1,3}"
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_PATTERN.replace("DIGITS", _DIGITS_3), "ByteLevel"): "llama-bpe",
    (_PATTERN.replace("DIGITS", r"\p{N}"), "ByteLevel"): "qwen2",
}


@dataclass
class Vocabulary:
    """Tokens in the order of their ids, each with its kind; scores of a "llama", merges of a "gpt2" vocabulary."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    add_space_prefix: bool = False
    notes: tuple[str, ...] = ()
    """What the tokenizer does to a text that llama.cpp will not do."""


def tokenizer_fields(path: Path, rows: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The `tokenizer.*` entries for a model's folder or .gguf file.

    Args:
        rows: of the embedding; tokens that it has beyond the tokenizer's are named and marked unused.
    Returns:
        The entries, and a sentence on each thing that the tokenizer does to a text and llama.cpp does not.
    Raises:
        InputError: no tokenizer, one larger than the embedding, or one of a kind llama.cpp has no name for.
    """
    if path.is_file():
        return _copied(path), ()
    tokenizer = load_tokenizer(path)
    tokenizer.check(rows)
    vocabulary = _from_sentencepiece(path) if (path / "tokenizer.model").is_file() else _from_json(path)
    _add_tokens(vocabulary, path)
    for token in range(len(vocabulary.tokens), rows):
        _append(vocabulary, f"[PAD{token}]", UNUSED)
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": vocabulary.model,
        "tokenizer.ggml.pre": vocabulary.pre,
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": vocabulary.types,
        "tokenizer.ggml.scores": vocabulary.scores,
        "tokenizer.ggml.merges": vocabulary.merges,
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_id,
        "tokenizer.ggml.unknown_token_id": _first(vocabulary.types, UNKNOWN),
        "tokenizer.ggml.add_bos_token": tokenizer.adds_bos,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": vocabulary.add_space_prefix,
        "tokenizer.chat_template": _chat_template(path),
    }
    return {name: value for name, value in fields.items() if value is not None}, vocabulary.notes


def _copied(file: Path) -> dict[str, Any]:
    """The entries of another GGUF file, as they are."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    return {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.")}


def _first(types: list[int], kind: int) -> int | None:
    return types.index(kind) if kind in types else None


def _append(vocabulary: Vocabulary, text: str, kind: int) -> None:
    vocabulary.tokens.append(text)
    vocabulary.types.append(kind)
    if vocabulary.scores is not None:
        vocabulary.scores.append(0.0)


def _chat_template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    found = read_json(config).get("chat_template") if config.is_file() else None
    return found if isinstance(found, str) else None


def _add_tokens(vocabulary: Vocabulary, folder: Path) -> None:
    """Tokens that were added to the vocabulary later, and marks on those in it that text never becomes."""
    added: dict[int, tuple[str, bool]] = {}
    if (folder / "added_tokens.json").is_file():
        added = {i: (text, True) for text, i in read_json(folder / "added_tokens.json").items() if isinstance(i, int)}
    for name, key in (("tokenizer_config.json", "added_tokens_decoder"), ("tokenizer.json", "added_tokens")):
        raw = read_json(folder / name).get(key) if (folder / name).is_file() else None
        if isinstance(raw, dict):
            raw = [value | {"id": int(i)} for i, value in raw.items() if isinstance(value, dict) and i.isdigit()]
        for entry in raw or ():
            added[entry["id"]] = (entry["content"], bool(entry.get("special")))
    for token, (text, special) in sorted(added.items()):
        kind = CONTROL if special else USER_DEFINED
        if token < len(vocabulary.tokens):
            # What SentencePiece itself knows about a token stays: <unk> is special, and not a control token.
            if vocabulary.types[token] == NORMAL or vocabulary.tokens[token] != text:
                vocabulary.tokens[token], vocabulary.types[token] = text, kind
        else:
            while len(vocabulary.tokens) < token:
                _append(vocabulary, f"[PAD{len(vocabulary.tokens)}]", UNUSED)
            _append(vocabulary, text, kind)


# --- SentencePiece ----------------------------------------------------------------------------------------


def _from_sentencepiece(folder: Path) -> Vocabulary:
    file = folder / "tokenizer.model"
    pieces: list[tuple[str, float, int]] = []
    kind, prefix = 1, True  # SentencePiece's own defaults: unigram, and a space before the text
    joins, rules = True, b""
    try:
        for number, value in _messages(file.read_bytes()):
            if number == 1:
                piece = dict(_messages(value))
                (score,) = struct.unpack("<f", piece.get(2, b"\0\0\0\0"))
                pieces.append((piece[1].decode(), score, piece.get(3, NORMAL)))
            elif number == 2:
                kind = dict(_messages(value)).get(3, 1)
            elif number == 3:
                normalizer = dict(_messages(value))
                prefix, joins = bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1))
                rules = normalizer.get(2, b"")
    except (IndexError, KeyError, AttributeError, TypeError, struct.error, UnicodeDecodeError):
        raise InputError(f"{file} is no whole SentencePiece model: copy it again from the model's source") from None
    if kind != _SENTENCEPIECE_BPE:
        raise InputError(f"{file} is of SentencePiece's kind {kind}, expected its BPE (2): GGUF has no LLaMA like that")
    texts, scores, types = (list(column) for column in zip(*pieces, strict=True))
    notes = (
        *(("the tokenizer makes one space of several, which llama.cpp does not",) if joins else ()),
        *(("the tokenizer rewrites characters (NFKC, say), which llama.cpp does not",) if rules else ()),
    )
    return Vocabulary("llama", "default", texts, types, scores, add_space_prefix=prefix, notes=notes)


def _messages(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field, value) of a Protocol Buffers message; int for numbers, bytes for everything else."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        tag = varint()
        wire = tag & 7
        if wire == 0:
            yield tag >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(wire)
        if size is None:
            if wire != 2:
                raise KeyError(wire)
            size = varint()
        if at + size > len(data):
            raise IndexError(size)
        yield tag >> 3, data[at : at + size]
        at += size


# --- tokenizer.json ---------------------------------------------------------------------------------------


def _from_json(folder: Path) -> Vocabulary:
    file = folder / "tokenizer.json"
    raw = read_json(file)
    model = raw.get("model") or {}
    if model.get("type") != "BPE" or not model.get("vocab"):
        raise InputError(f"{file} is of type {model.get('type')!r}, expected 'BPE': llama.cpp has no LLaMA like that")
    size = max(model["vocab"].values()) + 1
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for text, token in model["vocab"].items():
        tokens[token], types[token] = text, NORMAL
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
    if model.get("byte_fallback"):
        return _like_sentencepiece(raw, tokens, types, merges)
    return Vocabulary("gpt2", _split_name(raw, file), tokens, types, merges=merges)


def _split_name(raw: dict[str, Any], file: Path) -> str:
    """llama.cpp's name for how the text is split before the merges."""
    splitter = raw.get("pre_tokenizer") or {}
    parts = splitter.get("pretokenizers", [splitter]) if splitter.get("type") == "Sequence" else [splitter]
    rule = tuple(str((part.get("pattern") or {}).get("Regex") or part.get("type")) for part in parts)
    prefixed = any(part.get("add_prefix_space") for part in parts)
    joined = any(part.get("type") == "Digits" and not part.get("individual_digits") for part in parts)
    normalizer = (raw.get("normalizer") or {}).get("type")
    name = _SPLITS.get(rule)
    if name is None or prefixed or joined or normalizer not in (None, "NFC"):
        told = json.dumps(splitter, ensure_ascii=False)
        told = told if len(told) < 160 else told[:157] + "..."
        raise InputError(
            f"{file} splits text by {told}, expected the rule of {', '.join(_SPLITS.values())}: llama.cpp would "
            "cut text into other tokens; give --format safetensors"
        )
    return name


def _like_sentencepiece(raw: dict[str, Any], tokens: list[str], types: list[int], merges: list[str]) -> Vocabulary:
    """A tokenizer.json that was converted from SentencePiece: what merges first scores highest."""
    rank: dict[str, int] = {}
    for i, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", "", 1), i)
    unknown = raw["model"].get("unk_token")
    for i, text in enumerate(tokens):
        if text == unknown:
            types[i] = UNKNOWN
        elif len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[i] = BYTE
    scores = [-float(rank.get(text, len(merges))) for text in tokens]
    steps = (raw.get("normalizer") or {}).get("normalizers", [raw.get("normalizer") or {}])
    prefix = any(step.get("type") == "Prepend" for step in steps) or (raw.get("pre_tokenizer") or {}).get(
        "prepend_scheme", "never"
    ) in ("always", "first")
    return Vocabulary("llama", "default", tokens, types, scores, add_space_prefix=prefix)
