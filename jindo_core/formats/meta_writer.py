"""Writing Meta's format: consolidated.00.pth, as torch.save would, and params.json.

torch.save takes all tensors at once. Here its archive is written a tensor at a time: a zip file, not compressed, of a
pickle that describes the tensors, and the bytes of each in an entry of its own that begins at a multiple of 64.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jindo_core.causal_lm import ModelConfig
from jindo_core.errors import InputError
from jindo_core.formats.checksums import checksum, verify
from jindo_core.formats.hf_config import require_llama
from jindo_core.formats.meta import implied_factor
from jindo_core.formats.torch_file import read_records

WEIGHTS = "consolidated.00.pth"
_ALIGNMENT = 64
_ZIP64_EXTRA, _LOCAL_HEADER = 20, 30
_STORAGE = {torch.float32: "FloatStorage", torch.float16: "HalfStorage", torch.bfloat16: "BFloat16Storage"}


@dataclass(frozen=True)
class _Described:
    """A tensor to be written: its place in the archive, and what it is."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class _Storage:
    def __init__(self, tensor: _Described) -> None:
        self.tensor = tensor


class _Pickler(pickle.Pickler):
    """Pickles `_Described` as torch pickles a contiguous tensor."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, _Described):
            return NotImplemented
        strides: list[int] = []
        step = 1
        for size in reversed(value.shape):
            strides.insert(0, step)
            step *= size
        return (
            torch._utils._rebuild_tensor_v2,
            (_Storage(value), 0, value.shape, tuple(strides), False, OrderedDict()),
        )

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        count = 1
        for size in value.tensor.shape:
            count *= size
        return ("storage", getattr(torch, _STORAGE[value.tensor.dtype]), value.tensor.key, "cpu", count)


def write_pth(
    file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, tensors: Iterator[Tensor]
) -> dict[str, str]:
    """Write a state dict that torch.load(weights_only=True) reads, one tensor in memory at a time.

    Args:
        shapes: of all tensors, in the order in which `tensors` gives them. dtype: of all, fp32, fp16 or bf16.
    Returns:
        {name: checksum} of what was written.
    """
    described = {name: _Described(str(i), dtype, shape) for i, (name, shape) in enumerate(shapes.items())}
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=2).dump(OrderedDict(described))
    root = file.stem
    digests = {}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _entry(archive, f"{root}/data.pkl", memoryview(pickled.getvalue()))
        _entry(archive, f"{root}/byteorder", memoryview(sys.byteorder.encode()))
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}")
            digests[name] = checksum(tensor)
            data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
            _entry(archive, f"{root}/data/{described[name].key}", data)
        _entry(archive, f"{root}/version", memoryview(b"3\n"))
    return digests


def _entry(archive: zipfile.ZipFile, name: str, data: memoryview) -> None:
    entry = zipfile.ZipInfo(name)  # dated 1980: the same weights make the same file
    entry.file_size = data.nbytes
    assert archive.fp is not None
    begin = archive.fp.tell() + _LOCAL_HEADER + len(name) + _ZIP64_EXTRA + 4
    padding = -begin % _ALIGNMENT
    entry.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(entry, "w", force_zip64=True) as opened:
        opened.write(data)


def verify_pth(file: Path, digests: Mapping[str, str]) -> None:
    """Read every tensor back and compare its bytes with what was written.

    Raises:
        InputError: one differs, is missing, or is not alone.
    """
    found = read_records(file)
    if odd := found.keys() ^ digests.keys():
        raise InputError(f"{file} read back differs in the tensor {sorted(odd)[0]}: the disk is faulty")
    for name, digest in digests.items():
        verify(name, found[name].read(), digest, file)


# --- params.json ---------------------------------------------------------------------------------------


def meta_params(config: ModelConfig) -> dict[str, Any]:
    """The contents of params.json; only what differs from Meta's defaults, for its first versions take no more.

    Raises:
        InputError: something that Meta's code can't do: other families, windows, biases, other head sizes, another
            RoPE scaling than Llama 3's.
    """
    config = require_llama(config, "Meta's format")
    if config.sliding_window is not None:
        raise InputError(
            f"the model sees {config.sliding_window} tokens, which Meta's format has no place for: give --format "
            "safetensors"
        )
    if config.attention_bias or config.mlp_bias:
        raise InputError("the model has biases, which Meta's format has no place for: give --format safetensors")
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise InputError(
            f"the model has heads of {config.head_dim}, expected hidden_size / heads as in Meta's code: give --format "
            "safetensors"
        )
    params: dict[str, Any] = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.rms_norm_eps,
        **_feed_forward(config.hidden_size, config.intermediate_size),
    }
    if config.num_key_value_heads != config.num_attention_heads:
        params["n_kv_heads"] = config.num_key_value_heads
    if config.rope_theta != 10000.0:
        params["rope_theta"] = config.rope_theta
    if config.rope is not None:
        params |= _scaled_rope(config.rope, config.hidden_size)
    return params


def _scaled_rope(rope: Mapping[str, Any], dim: int) -> dict[str, Any]:
    fixed = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
    if rope["rope_type"] != "llama3" or any(rope.get(name) != value for name, value in fixed.items()):
        raise InputError(
            f"the model's RoPE scaling {dict(rope)} is not the one that Meta's code has (llama3, 1, 4, 8192): give "
            "--format safetensors"
        )
    implied = rope["factor"] == implied_factor(dim)
    return {"use_scaled_rope": True} | ({} if implied else {"rope_scaling_factor": rope["factor"]})


def _feed_forward(dim: int, width: int) -> dict[str, Any]:
    """multiple_of, and ffn_dim_multiplier where one is needed, from which Meta's code works out `width`."""
    for multiple in (256, 1024, 4096, 512, 128, 64, 32, 16, 8, 4, 2, 1):
        for factor in (None, 1.3, 1.5):
            if _meta_width(dim, multiple, factor) == width:
                return {"multiple_of": multiple} | ({} if factor is None else {"ffn_dim_multiplier": factor})
    multiple = width & -width  # the largest power of two in it
    factor = (width - 0.5 * multiple + 0.5) / int(2 * 4 * dim / 3)
    assert _meta_width(dim, multiple, factor) == width, (dim, width)
    return {"multiple_of": multiple, "ffn_dim_multiplier": factor}


def _meta_width(dim: int, multiple: int, factor: float | None) -> int:
    """The width of the feed-forward layers, as Meta's code works it out."""
    width = int(2 * (4 * dim) / 3)
    width = width if factor is None else int(factor * width)
    return multiple * -(-width // multiple)
