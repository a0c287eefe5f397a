"""Writing llama.cpp's format, through the `gguf` package, a tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jindo_core.causal_lm import ModelConfig
from jindo_core.errors import InputError
from jindo_core.formats.checksums import checksum, verify
from jindo_core.formats.gguf import GGUF_FAULTS
from jindo_core.formats.hf_config import require_llama
from jindo_core.formats.names import qk_to_pairs, rename
from jindo_core.nf4 import is_finite
from jindo_core.rotary import RotaryConfig, rope_frequencies

ROPE_FACTORS = "rope_freqs.weight"
TYPES = ("f32", "f16", "bf16", "q8_0")
_Q8_0_BLOCK, _Q8_0_BYTES = 32, 34
_ROWS = 1024
_TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class _Stored:
    """A tensor as the file holds it: its type's name, and bytes."""

    name: str
    source: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int


def stored_tensors(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> list[_Stored]:
    """What a file of `dtype` (one of `TYPES`) holds of each tensor: vectors are fp32, as llama.cpp wants them, and a
    matrix whose rows are no multiple of 32 is fp16 in a file of q8_0, as its converter does."""
    stored = []
    for source, shape in shapes.items():
        kind = "f32" if len(shape) == 1 else dtype
        if kind == "q8_0" and shape[-1] % _Q8_0_BLOCK:
            kind = "f16"
        count = math.prod(shape)
        size = count // _Q8_0_BLOCK * _Q8_0_BYTES if kind == "q8_0" else count * _TORCH[kind].itemsize
        name = rename(source, "huggingface", "gguf")
        if name is None:
            raise InputError(f"the tensor {source} has no name in GGUF's LLaMA: give --format safetensors")
        stored.append(_Stored(name, source, kind, shape, size))
    return stored


def _encoded(value: Tensor, stored: _Stored) -> np.ndarray[Any, Any]:
    """The tensor's bytes, uint8, with the file's shape in bytes."""
    if stored.kind == "q8_0":
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import quantize

        rows = value.view(-1, value.shape[-1])
        # A few rows at a time: gguf's temporaries are several times what they make.
        parts = [quantize(part.float().numpy(), GGMLQuantizationType.Q8_0) for part in rows.split(_ROWS)]
        return np.concatenate(parts)
    cast = value.to(_TORCH[stored.kind]).contiguous()
    if not is_finite(cast):
        raise InputError(f"the tensor {stored.source} does not fit {stored.kind}: give --dtype bf16 or f32")
    return cast.view(torch.uint8).numpy()


def architecture(config: ModelConfig) -> str:
    """The model's name in llama.cpp, which calls a Mistral llama."""
    return "qwen2" if config.model_type == "qwen2" else "llama"


def model_fields(config: ModelConfig, name: str, dtype: str) -> dict[str, Any]:
    """The `general.*` entries and the architecture's own.

    Raises:
        InputError: a family that is not LLaMA-shaped, memory layers, a Qwen2 with a window, or a RoPE scaling that
            llama.cpp has no entry for.
    """
    from gguf.constants import LlamaFileType

    config, kind = require_llama(config, "GGUF"), architecture(config)
    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    fields: dict[str, Any] = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": int(LlamaFileType[kinds[dtype]]),
        "general.quantization_version": 2,
    }
    sizes: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_theta),
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    if config.sliding_window is not None:
        if kind == "qwen2":
            raise InputError(
                "the model is a 'qwen2' with a sliding window, which llama.cpp has not: give --format safetensors"
            )
        sizes["attention.sliding_window"] = config.sliding_window
    return fields | {f"{kind}.{key}": value for key, value in (sizes | _rope_entries(config, kind)).items()}


def _rope_entries(config: ModelConfig, architecture: str) -> dict[str, Any]:
    rope = config.rope or {"rope_type": "default"}
    kind = rope["rope_type"]
    if kind == "default" or (kind in ("llama3", "factors") and architecture == "llama"):
        return {}
    if kind not in ("linear", "yarn"):
        raise InputError(
            f"the model's RoPE scaling {kind!r} has no place in GGUF's {architecture}: give --format safetensors"
        )
    extra = set(rope) - {"rope_type", "factor", "original_max_position_embeddings", "type"}
    if kind == "yarn" and any(rope[key] is not None for key in extra):
        raise InputError(f"the model's yarn settings {sorted(extra)} have no place in GGUF: give --format safetensors")
    context = rope.get("original_max_position_embeddings", config.max_position_embeddings)
    entries = {
        "rope.scaling.type": kind,
        "rope.scaling.factor": float(rope.get("factor") or config.max_position_embeddings / context),
    }
    return entries | ({"rope.scaling.original_context_length": context} if kind == "yarn" else {})


def rope_factors(config: RotaryConfig) -> Tensor | None:
    """Divisors of the rotary frequencies, fp32 [D/2], where llama.cpp takes them as a tensor (Llama 3)."""
    if (config.rope or {}).get("rope_type") not in ("llama3", "factors"):
        return None
    scaled, _ = rope_frequencies(config, config.max_position_embeddings)
    plain = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    return plain / scaled


def write_gguf(
    file: Path,
    fields: Mapping[str, Any],
    config: ModelConfig,
    stored: Sequence[_Stored],
    read: Callable[[str], Tensor],
) -> dict[str, str]:
    """Write a GGUF file, one tensor in memory at a time.

    Args:
        fields: entries (`model_fields`, `tokenizer_fields`). stored: `stored_tensors`.
        read: gives a tensor by its name in Hugging Face's layout.
    Returns:
        {name: checksum} of the tensors' bytes.
    """
    from gguf import GGUFWriter
    from gguf.constants import GGMLQuantizationType

    factors = rope_factors(config)
    writer = GGUFWriter(file, architecture(config))
    for name, value in fields.items():
        writer.add_key_value(name, value, *_types(value))
    if factors is not None:
        stored = [_Stored(ROPE_FACTORS, ROPE_FACTORS, "f32", tuple(factors.shape), factors.nbytes), *stored]
    for one in stored:
        rows = one.nbytes // math.prod(one.shape[:-1])
        kind = GGMLQuantizationType[one.kind.upper()]
        writer.add_tensor_info(one.name, (*one.shape[:-1], rows), np.dtype(np.uint8), one.nbytes, kind)
    digests = {}
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for one in stored:
            if factors is not None and one.name == ROPE_FACTORS:
                data = _encoded(factors, one)
            else:
                data = _encoded(_in_their_order(read(one.source), one.source, config), one)
            digests[one.name] = checksum(torch.from_numpy(data))
            writer.write_tensor_data(data)
    finally:
        writer.close()
    return digests


def _in_their_order(value: Tensor, name: str, config: ModelConfig) -> Tensor:
    """A tensor with its rows as llama.cpp has them: a LLaMA's q and k in pairs, a Qwen2's as they are."""
    if architecture(config) == "qwen2":
        return value
    return qk_to_pairs(name, value, config.num_attention_heads, config.num_key_value_heads)


def _types(value: Any) -> Iterator[Any]:
    """The GGUF type of an entry, and its elements' where it is a list."""
    from gguf.constants import GGUFValueType as Kind

    if isinstance(value, list):
        yield Kind.ARRAY
        yield {str: Kind.STRING, float: Kind.FLOAT32, int: Kind.INT32}[type(value[0])]
    else:
        yield {bool: Kind.BOOL, str: Kind.STRING, float: Kind.FLOAT32, int: Kind.UINT32}[type(value)]


def verify_gguf(file: Path, fields: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Read every entry and tensor back and compare with what was written.

    Raises:
        InputError: one differs or is missing.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except GGUF_FAULTS as error:
        raise InputError(f"{file} can't be read back ({error}): the disk is faulty") from None
    for name, value in fields.items():
        found = reader.get_field(name)
        expected = np.float32(value) if isinstance(value, float) else value
        if isinstance(value, list) and isinstance(value[0], float):
            expected = [float(np.float32(number)) for number in value]
        if found is None or found.contents() != expected:
            raise InputError(f"{file} read back differs in the entry {name}: the disk is faulty")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if odd := tensors.keys() ^ digests.keys():
        raise InputError(f"{file} read back differs in the tensor {sorted(odd)[0]}: the disk is faulty")
    for name, digest in digests.items():
        data = np.ascontiguousarray(tensors[name].data).view(np.uint8)
        verify(name, torch.from_numpy(data.copy()), digest, file)
