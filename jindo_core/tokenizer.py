"""From text to token ids and back, as the model was trained on.

A folder with a `tokenizer.json` is read through transformers, as that file says and without a conversion; one
with only a SentencePiece `tokenizer.model` through the sentencepiece package itself, because transformers 5
converts it unfaithfully (spaces at the start and in a row differ, the text "</s>" becomes EOS). A GGUF file
brings its tokenizer along.
"""

from __future__ import annotations

import json
import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jindo_core.errors import InputError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

REPLACEMENT = "\ufffd"
"""What bytes that are no UTF-8 decode to."""


class Tokenizer(ABC):
    """Text to ids and back. Made by `load_tokenizer`.

    Attributes:
        vocab_size: one more than the largest id that it gives.
        bos_id, eos_id: ids of the tokens that begin and end a text, None where it has none.
        adds_bos: whether it puts BOS before a text by itself.
        pad_id: filler for padding, always an id that exists (its own pad token, else EOS, else 0). It says
            nothing about where padding is: that is known from lengths alone.
    """

    def __init__(
        self, *, vocab_size: int, bos_id: int | None, eos_id: int | None, pad_id: int | None, adds_bos: bool
    ) -> None:
        self.vocab_size = vocab_size
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.adds_bos = adds_bos and bos_id is not None
        if pad_id is not None:
            self.pad_id = pad_id
        else:
            self.pad_id = 0 if eos_id is None else eos_id

    def encode(self, text: str, *, bos: bool | None = None) -> list[int]:
        """Ids of `text`, without EOS.

        Args:
            bos: whether BOS comes first; None: where the tokenizer adds one by itself.
        Raises:
            InputError: `bos` is True and there is no BOS token.
        """
        ids = self._encode(text)
        if self.adds_bos if bos is None else bos:
            if self.bos_id is None:
                raise InputError("this tokenizer has no BOS token: expected bos=False or bos=None")
            ids.insert(0, self.bos_id)
        return ids

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Ids of the text alone."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`. Special tokens and ids beyond the vocabulary (a padded embedding's) are left out."""

    def check(self, vocab_size: int) -> None:
        """See that every id has a row in an embedding of `vocab_size` rows.

        Raises:
            InputError: a special id, or the vocabulary, is larger than the embedding.
        """
        for name, token in (("BOS", self.bos_id), ("EOS", self.eos_id)):
            if token is not None and token >= vocab_size:
                raise InputError(
                    f"the tokenizer's {name} id is {token}, but the model's embedding has {vocab_size} rows: "
                    "expected the tokenizer that came with this model"
                )
        if self.vocab_size > vocab_size:
            raise InputError(
                f"the tokenizer has {self.vocab_size} tokens, but the model's embedding has {vocab_size} rows: "
                "expected the tokenizer that came with this model, without tokens added later"
            )


class StreamDecoder:
    """Decodes ids as they come, one at a time, into text that is never taken back.

    A Korean syllable is three bytes and often two or three tokens; until its last byte is there it decodes to
    U+FFFD, so such an end is held back. All pieces together are `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._sent = 0  # characters

    def push(self, token: int) -> str:
        """Add an id; returns the text that it made certain, which may be empty."""
        self._ids.append(token)
        # All ids, each time: what a token looks like depends on its neighbours (a leading space, bytes), and
        # decoding a thousand ids takes well under a millisecond.
        return self._advance(self._tokenizer.decode(self._ids).rstrip(REPLACEMENT))

    def flush(self) -> str:
        """The text still held back, after the last id. Bytes that never became a character are U+FFFD."""
        return self._advance(self._tokenizer.decode(self._ids))

    def _advance(self, text: str) -> str:
        new = text[self._sent :]
        self._sent += len(new)
        return new


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model.

    Args:
        path: a folder with `tokenizer.json` (which wins: it also knows tokens that were added later) or with
            `tokenizer.model` (of Meta's weights also one folder up, where LLaMA 1 has it); or a .gguf file.
    Raises:
        InputError: no such path, no tokenizer there, or one that can't be read.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return _load_gguf(path)
    if not path.is_dir():
        raise InputError(f"tokenizer path {path} does not exist: expected a model's folder or a .gguf file")
    if (path / "tokenizer.json").is_file():
        return _load_json(path)
    if (path / "tokenizer.model").is_file():
        return _load_sentencepiece(path)
    if (path / "params.json").is_file() and (path.parent / "tokenizer.model").is_file():
        return _load_sentencepiece(path.parent)
    if (path / "adapter_config.json").is_file():
        raise InputError(f"{path} is a LoRA adapter: give it as --lora_weights, and its base as --base_model")
    raise InputError(
        f"{path} holds no tokenizer: expected tokenizer.json or tokenizer.model; copy it there from the model's source"
    )


# --- SentencePiece --------------------------------------------------------------------------------------


class _SentencePiece(Tokenizer):
    """tokenizer.model. Text is text: "</s>" inside it never becomes EOS."""

    def __init__(self, processor: SentencePieceProcessor, **special: Any) -> None:
        super().__init__(**special)
        self._processor = processor
        self._pieces = processor.get_piece_size()
        self._silent = {self.bos_id, self.eos_id}

    def _encode(self, text: str) -> list[int]:
        return list(self._processor.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        kept = [int(i) for i in ids if i < self._pieces and i not in self._silent]
        return str(self._processor.decode(kept)) if kept else ""


def _processor(file: Path) -> SentencePieceProcessor:
    from sentencepiece import SentencePieceProcessor

    data = file.read_bytes()
    if not data:  # the library takes no bytes for a call without a model, and fails at the first use
        raise InputError(f"{file} is empty, expected a SentencePiece model: copy it again from the model's source")
    if re.match(rb"[A-Za-z0-9+/=]+ 0\n", data):
        raise InputError(
            f"{file} is a tiktoken vocabulary (LLaMA 3), expected a SentencePiece model: put tokenizer.json "
            "beside it, from Hugging Face's version of the model"
        )
    try:
        return SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise InputError(
            f"{file} is no whole SentencePiece model ({len(data)} bytes): copy it again from the model's source"
        ) from error


def _load_sentencepiece(folder: Path) -> Tokenizer:
    processor = _processor(folder / "tokenizer.model")
    config = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
    added = _added_tokens(folder, config)
    size = processor.get_piece_size()

    def declared(name: str) -> int | None:
        """The id of a special token that the configuration names; None where it names none."""
        text = _token_text(config.get(name))
        if text is None:
            return None
        if text in added:
            return added[text]
        token = processor.piece_to_id(text)
        return token if processor.id_to_piece(token) == text else None

    def special(name: str, own: int) -> int | None:
        token = declared(name)
        if token is None and (text := _token_text(config.get(name))) is not None:
            raise InputError(
                f"{folder} names {text!r} as {name}, which is no piece of its tokenizer.model: "
                "correct tokenizer_config.json or take the model's own tokenizer"
            )
        if token is None and own >= 0:
            return own
        return token if token is not None else _model_token(folder, f"{name}_id")

    bos, eos, pad = special("bos_token", processor.bos_id()), special("eos_token", processor.eos_id()), None
    # A pad token that was added later has no row in the embedding, and needs none: any filler does.
    for candidate in (declared("pad_token"), processor.pad_id()):
        if pad is None and candidate is not None and 0 <= candidate < size:
            pad = candidate
    adds_bos = config.get("add_bos_token")
    return _SentencePiece(
        processor,
        vocab_size=max(size, *(token + 1 for token in (bos, eos) if token is not None), 1),
        bos_id=bos,
        eos_id=eos,
        pad_id=pad,
        adds_bos=adds_bos is None or bool(adds_bos),  # LLaMA's tokenizer adds it unless it is told not to
    )


def _added_tokens(folder: Path, config: dict[str, Any]) -> dict[str, int]:
    """Text -> id of the tokens that were added to a tokenizer.model, from the two places that tell them."""
    added = {text: i for text, i in _read_json(folder / "added_tokens.json").items() if isinstance(i, int)}
    entries = config.get("added_tokens_decoder")
    if isinstance(entries, dict):
        for key, value in entries.items():
            text = _token_text(value)
            if text is not None and key.isdigit():
                added[text] = int(key)
    return added


# --- tokenizer.json and GGUF, through transformers --------------------------------------------------------


class _Fast(Tokenizer):
    """A tokenizer of the `tokenizers` library, as transformers set it up."""

    def __init__(self, tokenizer: Any, bos_id: int | None = None, eos_id: int | None = None) -> None:
        bos = bos_id if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
        eos = eos_id if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
        probe = tokenizer("x").input_ids
        super().__init__(
            vocab_size=max(tokenizer.get_vocab().values(), default=-1) + 1,
            bos_id=bos,
            eos_id=eos,
            pad_id=tokenizer.pad_token_id,
            adds_bos=bool(probe) and probe[0] == bos,
        )
        self._backend = tokenizer.backend_tokenizer
        # Files written by trainers carry their cutoff and padding; neither belongs to the tokenizer.
        self._backend.no_truncation()
        self._backend.no_padding()

    def _encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        kept = [int(i) for i in ids if i not in (self.bos_id, self.eos_id)]
        return str(self._backend.decode(kept, skip_special_tokens=True))


def _load_json(folder: Path) -> Tokenizer:
    raw = _read_json(folder / "tokenizer.json")
    if not isinstance(raw.get("model"), dict):
        raise InputError(f"{folder / 'tokenizer.json'} has no 'model': expected a tokenizers file; copy it again")
    # Not AutoTokenizer: the classes it picks rebuild parts of some tokenizers (LLaMA's, GPT-2's) by their own
    # rules, while the file says exactly what to do.
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        fault = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no more is said'}"
        raise InputError(f"{folder / 'tokenizer.json'} can't be read ({fault}): copy it again") from error
    return _Fast(tokenizer, _model_token(folder, "bos_token_id"), _model_token(folder, "eos_token_id"))


def _load_gguf(file: Path) -> Tokenizer:
    with open(file, "rb") as opened:
        magic = opened.read(4)
    if magic != b"GGUF":
        raise InputError(f"{file} begins with {magic!r}, expected a GGUF file or a model's folder")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True)
    except (OSError, ValueError, KeyError, IndexError, struct.error) as error:
        raise InputError(
            f"the tokenizer in {file} can't be read ({type(error).__name__}): the file is cut short or of a kind "
            "that transformers does not know; fetch it again"
        ) from error
    return _Fast(tokenizer)


# --- the small JSON files beside a tokenizer ----------------------------------------------------------------


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is no valid JSON ({error}): copy it again from the model's source") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} holds a {type(value).__name__}, expected a JSON object")
    return value


def _token_text(value: object) -> str | None:
    """A special token's text, from a string or an object with "content"; None where it is empty or missing."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _model_token(folder: Path, name: str) -> int | None:
    """bos_token_id or eos_token_id from config.json, for a tokenizer that names none: else nothing ever stops."""
    value = _read_json(folder / "config.json").get(name)
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
