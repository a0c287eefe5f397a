"""Meta's own layout: params.json and consolidated.00.pth, .01, …: one file a model-parallel rank.

Ranks hold equal parts of a tensor: output rows of wq, wk, wv, w1, w3 and output, input columns of wo and w2, and of
tok_embeddings columns in LLaMA 1 and 2, rows in LLaMA 3: the shapes tell which. Norms are whole in every rank.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jindo_core.config_json import MOST_LAYERS, ConfigReader
from jindo_core.errors import InputError
from jindo_core.files import read_json
from jindo_core.formats.names import qk_to_halves, rename
from jindo_core.formats.places import FLOATS, Place, open_size
from jindo_core.formats.torch_file import read_records
from jindo_core.model import LlamaConfig
from jindo_core.nf4 import NF4Weight

PARAMS = "params.json"
BY_COLUMNS = (".self_attn.o_proj.weight", ".mlp.down_proj.weight")
LEFT_OUT = "rope.freqs"
"""Ends the names of tensors that params.json says already; LLaMA 1 has one in every layer."""


class _Split(NamedTuple):
    """A tensor's parts, one a rank, and the dimension along which they join; None: each is the whole."""

    parts: list[Place]
    dim: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        if self.dim is not None:
            shape[self.dim] *= len(self.parts)
        return tuple(shape)


def is_meta(folder: Path) -> bool:
    """Whether a folder is in Meta's layout."""
    return (folder / PARAMS).is_file() and not (folder / "config.json").is_file()


class MetaCheckpoint:
    """A LLaMA as Meta publishes it, its ranks joined as they are read. See `Checkpoint` for the attributes."""

    def __init__(self, folder: Path) -> None:
        read = ConfigReader(read_json(folder / PARAMS), str(folder / PARAMS))
        self.files = _rank_files(folder)
        self.nbytes = sum(open_size(file) for file in self.files)
        self.quantized = frozenset[str]()
        self._splits = _join(self.files, read.whole("dim"))
        self.shapes = {name: split.shape for name, split in self._splits.items()}
        self.config = LlamaConfig.from_dict(_config(read, self.shapes, folder), read.source)
        self._check_ranks(folder)

    def read(self, name: str) -> Tensor:
        split = self._splits[name]
        if split.dim is None:
            stretch = split.parts[0].read_bytes()  # compared as bytes: a NaN equals itself
            odd = next((part.file for part in split.parts[1:] if not torch.equal(part.read_bytes(), stretch)), None)
            if odd is not None:
                first = split.parts[0].file
                raise InputError(f"the tensor {name} differs between {first} and {odd.name}: they are of two models")
            return split.parts[0].view(stretch)
        value = torch.empty(split.shape, dtype=split.parts[0].dtype)
        for part, into in zip(split.parts, value.chunk(len(split.parts), split.dim), strict=True):
            into.copy_(part.read())
        return qk_to_halves(name, value, self.config.num_attention_heads, self.config.num_key_value_heads)

    def read_nf4(self, name: str) -> NF4Weight:
        raise KeyError(f"{name}: Meta's layout holds no NF4")

    def dtype_of(self, name: str) -> torch.dtype:
        return self._splits[name].parts[0].dtype

    def nbytes_of(self, name: str) -> int:
        # Whole and a part beside it, or whole in two row orders.
        split = self._splits[name]
        whole = sum(part.nbytes for part in split.parts)
        return 2 * whole if ".q_proj." in name or ".k_proj." in name else whole + split.parts[0].nbytes

    def _check_ranks(self, folder: Path) -> None:
        """A rank that is missing at the end leaves no other trace than tensors that are too small."""
        rows = self.shapes["model.layers.0.self_attn.q_proj.weight"][0]
        width = self.config.num_attention_heads * self.config.head_dim
        if rows != width:
            raise InputError(
                f"{folder} holds {len(self.files)} consolidated files, in which wq has {rows} rows together, expected "
                f"{width}: one is missing, or too many are there"
            )


def _rank_files(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if re.fullmatch(r"consolidated\.\d+\.pth", path.name))
    for rank, path in enumerate(found or [folder / "nothing"]):
        if path.name != f"consolidated.{rank:02d}.pth":
            raise InputError(f"{folder / f'consolidated.{rank:02d}.pth'} is missing: download the checkpoint again")
    return found


def _join(files: list[Path], width: int) -> dict[str, _Split]:
    """{Hugging Face's name: split tensor}; every rank must hold the same names and shapes."""
    ranks = [read_records(file) for file in files]
    splits = {}
    for theirs in ranks[0].keys() | set().union(*ranks[1:]):
        if theirs.endswith(LEFT_OUT):
            continue
        parts = []
        for rank, file in zip(ranks, files, strict=True):
            if theirs not in rank:
                raise InputError(f"{file} lacks the tensor {theirs}: download it again")
            parts.append(rank[theirs])
        name = rename(theirs, "meta", "huggingface") or theirs
        _check_parts(theirs, parts)
        splits[name] = _Split(parts, _join_dim(name, parts, width))
    return splits


def _check_parts(name: str, parts: list[Place]) -> None:
    first = parts[0]
    if first.dtype not in FLOATS:
        raise InputError(f"the tensor {name} in {first.file} is of type {first.dtype}, expected 16 or 32-bit floats")
    for part in parts[1:]:
        if (part.shape, part.dtype) != (first.shape, first.dtype):
            raise InputError(
                f"the tensor {name} is {part.dtype} {part.shape} in {part.file}, but {first.dtype} {first.shape} in "
                f"{first.file.name}: the files are of different models"
            )


def _join_dim(name: str, parts: list[Place], width: int) -> int | None:
    if len(parts[0].shape) < 2:
        return None
    if name.endswith(BY_COLUMNS):
        return 1
    if name == "model.embed_tokens.weight":
        return 0 if parts[0].shape[1] == width else 1
    return 0


def _config(read: ConfigReader, shapes: dict[str, tuple[int, ...]], folder: Path) -> dict[str, Any]:
    """params.json in config.json's terms; sizes that it leaves out are the weights'."""
    embedding, gate = "model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight"
    for name in (embedding, gate, "model.layers.0.self_attn.q_proj.weight"):
        if len(shapes.get(name, ())) != 2:
            theirs = rename(name, "huggingface", "meta")
            raise InputError(f"{folder}: the tensor {theirs} is missing: expected a LLaMA's weights")
    heads = read.whole("n_heads")
    return {
        "model_type": "llama",
        "vocab_size": shapes[embedding][0],  # params.json may say -1: as the tokenizer has
        "hidden_size": read.whole("dim"),
        "intermediate_size": shapes[gate][0],
        "num_hidden_layers": read.whole("n_layers", most=MOST_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": read.whole("n_kv_heads", heads),
        "rms_norm_eps": read.positive("norm_eps", 1e-5),
        "rope_theta": read.positive("rope_theta", 10000.0),
        "rope_scaling": _rope_scaling(read),
        "max_position_embeddings": _context(read, shapes[embedding][0]),
        "tie_word_embeddings": "lm_head.weight" not in shapes,
    }


def _rope_scaling(read: ConfigReader) -> dict[str, Any] | None:
    """LLaMA 3.1's scaling."""
    if not read.switch("use_scaled_rope", False):
        return None
    return {
        "rope_type": "llama3",
        "factor": read.positive("rope_scaling_factor", implied_factor(read.whole("dim"))),
        "low_freq_factor": 1.0,
        "high_freq_factor": read.positive("rope_high_freq_factor", 4.0),
        "original_max_position_embeddings": 8192,
    }


def implied_factor(dim: int) -> float:
    """The scaling's factor where params.json gives none, as Meta's do: 32 in the small models of LLaMA 3.2 (1B and 3B),
    else 8."""
    return 32.0 if dim in (2048, 3072) else 8.0


def _context(read: ConfigReader, vocabulary: int) -> int:
    """Tokens that the model was trained on at once. params.json does not say it; what tells the published models apart
    is RoPE (3.1 and later; Code Llama), the vocabulary (3), and norm_eps with grouped heads at 8192 (2, not 1)."""
    if read.switch("use_scaled_rope", False):
        return 131072
    if read("rope_theta") == 1e6:
        return 16384
    if vocabulary >= 128000:
        return 8192
    second = read("norm_eps") == 1e-5 and (read("dim") != 8192 or "n_kv_heads" in read.raw)
    return 4096 if second else 2048
