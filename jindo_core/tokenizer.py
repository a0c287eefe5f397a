"""From text to token ids and back, as the model was trained on.

A folder with a `tokenizer.json` is read through transformers, as that file says and without a conversion; one
with only a SentencePiece `tokenizer.model` through the sentencepiece package itself, because transformers 5
converts it unfaithfully (spaces at the start and in a row differ, the text "</s>" becomes EOS). A GGUF file
brings its tokenizer along.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jindo_core.errors import InputError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

REPLACEMENT = "\ufffd"
"""What bytes that are no UTF-8 decode to."""


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """A token that no text becomes by itself. takes_left, takes_right: white space beside it belongs to it."""

    id: int
    takes_left: bool = False
    takes_right: bool = False


class Tokenizer(ABC):
    """Text to ids and back. Made by `load_tokenizer`.

    Attributes:
        vocab_size: one more than the largest id that it gives.
        bos_id, eos_id: ids of the tokens that begin and end a text, None where it has none.
        adds_bos: whether it puts BOS before a text by itself.
        pad_id: filler for padding, always an id that exists (its own pad token, else EOS, else 0). It says
            nothing about where padding is: that is known from lengths alone.
        special_tokens: those that the model has an embedding for, by their text.
        chat_template: Jinja source of the model's own form of a conversation, None where it brings none.
        special_texts: of bos_token, eos_token, unk_token and pad_token, as a chat template asks for them.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        bos_id: int | None,
        eos_id: int | None,
        pad_id: int | None,
        adds_bos: bool,
        special_tokens: dict[str, SpecialToken],
        chat_template: str | None = None,
        special_texts: dict[str, str] | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.adds_bos = adds_bos and bos_id is not None
        if pad_id is not None:
            self.pad_id = pad_id
        else:
            self.pad_id = 0 if eos_id is None else eos_id
        self.special_tokens = special_tokens
        self.chat_template = chat_template
        self.special_texts = special_texts or {}

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
    def encode_batch(self, texts: Sequence[str], *, opens: bool = True) -> list[list[int]]:
        """Ids of each text, without BOS and EOS, on the library's own threads.

        Text is only text: a special token's name inside it becomes ordinary tokens.

        Args:
            opens: the texts begin a row; False: a special token stands before them. Some tokenizers put a space
                before a row's first word alone.
        """

    @abstractmethod
    def encode_spans(self, texts: Sequence[str], *, opens: bool = True) -> list[tuple[list[int], list[int]]]:
        """As `encode_batch`, and for each token where the last character that it stands for lies in its text.

        Bytes of one character all lie where it does; a token that the tokenizer itself puts before a text, at 0.
        """

    @abstractmethod
    def piece(self, token: int) -> str:
        """A token as the vocabulary writes it."""

    @abstractmethod
    def digest(self) -> str:
        """sha256 of what decides the ids: the vocabulary, its rules, the library's version, BOS and EOS."""

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

    def encode_batch(self, texts: Sequence[str], *, opens: bool = True) -> list[list[int]]:
        return [list(ids) for ids in self._processor.encode(list(texts))] if texts else []

    def encode_spans(self, texts: Sequence[str], *, opens: bool = True) -> list[tuple[list[int], list[int]]]:
        if not texts:
            return []
        found = self._processor.encode(list(texts), return_type="offset_mapping")
        return [(list(row["ids"]), _last_characters(row["offsets"])) for row in found]

    def piece(self, token: int) -> str:
        return str(self._processor.id_to_piece(token)) if 0 <= token < self._pieces else f"<{token}>"

    def digest(self) -> str:
        import sentencepiece

        return _digest(self, self._processor.serialized_model_proto(), sentencepiece.__version__)

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
    vocab_size = max(size, *(token + 1 for token in (bos, eos) if token is not None), 1)
    control = {processor.id_to_piece(i): i for i in range(size) if processor.is_control(i)}
    return _SentencePiece(
        processor,
        vocab_size=vocab_size,
        bos_id=bos,
        eos_id=eos,
        pad_id=pad,
        adds_bos=adds_bos is None or bool(adds_bos),  # LLaMA's tokenizer adds it unless it is told not to
        # Tokens added later have rows in the embedding only as far as the vocabulary is known to reach.
        special_tokens={text: SpecialToken(i) for text, i in (control | added).items() if i < vocab_size},
        chat_template=_chat_template(folder, config),
        special_texts=_special_texts(processor, config, bos, eos),
    )


def _special_texts(
    processor: SentencePieceProcessor, config: dict[str, Any], bos: int | None, eos: int | None
) -> dict[str, str]:
    """What a chat template's variables bos_token, … say: the configuration's words, else the model's pieces."""
    names = {name: _token_text(config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    for name, token in (("bos_token", bos), ("eos_token", eos)):
        if names[name] is None and token is not None and token < processor.get_piece_size():
            names[name] = str(processor.id_to_piece(token))
    return {name: text for name, text in names.items() if text is not None}


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
            special_tokens={
                token.content: SpecialToken(i, token.lstrip, token.rstrip)
                for i, token in tokenizer.added_tokens_decoder.items()
                if token.special
            },
            chat_template=_default_template(tokenizer.chat_template),
            special_texts={
                name: text for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)
            },
        )
        self._backend = tokenizer.backend_tokenizer
        # Files written by trainers carry their cutoff and padding; neither belongs to the tokenizer.
        self._backend.no_truncation()
        self._backend.no_padding()

    def _encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _plain(self) -> tuple[Any, Any]:
        """Copies of the backend for which special tokens in a text are text: at a row's start, and further on."""
        from tokenizers import Tokenizer as Backend

        settings = json.loads(self._backend.to_str())
        settings["post_processor"] = None  # ByteLevel's takes white space out of a token's offsets
        first = Backend.from_str(json.dumps(settings))
        first.encode_special_tokens = True
        if '"prepend_scheme": "first"' not in json.dumps(settings["pre_tokenizer"]):
            return first, first
        rules = json.dumps(settings["pre_tokenizer"])
        settings["pre_tokenizer"] = json.loads(rules.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"'))
        later = Backend.from_str(json.dumps(settings))
        later.encode_special_tokens = True
        return first, later

    def encode_batch(self, texts: Sequence[str], *, opens: bool = True) -> list[list[int]]:
        backend = self._plain[0 if opens else 1]
        return [found.ids for found in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_spans(self, texts: Sequence[str], *, opens: bool = True) -> list[tuple[list[int], list[int]]]:
        backend = self._plain[0 if opens else 1]
        found = backend.encode_batch(list(texts), add_special_tokens=False)
        return [(row.ids, _last_characters(row.offsets)) for row in found]

    def piece(self, token: int) -> str:
        return str(self._backend.id_to_token(token) or f"<{token}>")

    def digest(self) -> str:
        import tokenizers

        return _digest(self, self._backend.to_str().encode(), tokenizers.__version__)

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


def _last_characters(offsets: Sequence[tuple[int, int]]) -> list[int]:
    """A character whose bytes are several tokens ends in the last of them: the others' offsets are empty."""
    return [end - 1 if end > begin else begin for begin, end in offsets]


def _digest(tokenizer: Tokenizer, rules: bytes, version: str) -> str:
    rest = (version, tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos, sorted(tokenizer.special_tokens.items()))
    return hashlib.sha256(rules + repr(rest).encode()).hexdigest()


# --- the small files beside a tokenizer ------------------------------------------------------------------


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


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is no UTF-8 (byte {error.start}): copy it again from its source") from error
    return _default_template(config.get("chat_template"))


def _default_template(found: object) -> str | None:
    """One template, or the one called default among several."""
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) else None


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
