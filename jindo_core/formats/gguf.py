"""llama.cpp's format, through the `gguf` package."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jindo_core.errors import InputError
from jindo_core.formats.names import qk_to_halves, rename
from jindo_core.formats.places import open_size
from jindo_core.model import LlamaConfig
from jindo_core.nf4 import NF4Weight

GGUF_KINDS = ("llama", "qwen2")
# What the gguf package raises on a file that is cut short or is no GGUF.
GGUF_FAULTS = (ValueError, KeyError, IndexError, OverflowError, UnicodeDecodeError)

CHUNK = 1 << 20
"""Weights that are dequantized at once."""


class GGUFCheckpoint:
    """A LLaMA or Qwen2 in llama.cpp's format, dequantized tensor by tensor as it is read."""

    def __init__(self, file: Path) -> None:
        from gguf import GGUFReader

        if file.is_dir():
            raise InputError(f"{file} is a folder, expected a .gguf file: name the file in it, or rename the folder")
        self._file = file
        self.files, self.quantized = [file], frozenset[str]()
        self.nbytes = open_size(file)
        try:
            self._reader = GGUFReader(file)
            self._tensors = {
                rename(tensor.name, "gguf", "huggingface") or tensor.name: tensor for tensor in self._reader.tensors
            }
            self.shapes = {
                name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self._tensors.items()
            }
            self.config = self._read_config()
        except InputError:
            raise
        except OSError as error:
            raise InputError(f"{file} can't be read ({error.strerror}): expected a readable file") from None
        except GGUF_FAULTS as error:
            raise InputError(f"{file} is truncated or no GGUF file ({error}): download it again") from None
        self.shapes.pop("rope_freqs.weight", None)  # read into the configuration

    def read(self, name: str) -> Tensor:
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        like = tensor.data  # mapped: looked at, never read, so that its pages don't stay in memory beside the model
        try:
            stored = np.fromfile(self._file, like.dtype, like.size, offset=tensor.data_offset).reshape(like.shape)
            value = torch.empty(self.shapes[name])
            # A few rows at a time: gguf's temporaries are several times what they make.
            rows, step = value.view(like.shape[0], -1), max(1, CHUNK * like.shape[0] // value.numel())
            for start in range(0, like.shape[0], step):
                part = dequantize(stored[start : start + step], tensor.tensor_type)
                rows[start : start + step] = torch.from_numpy(part).view(part.shape[0], -1)
        except (NotImplementedError, OSError, *GGUF_FAULTS) as error:
            raise InputError(f"the tensor {name} in {self._file} can't be read: {error}") from None
        # llama.cpp rotates a LLaMA's pairs (2i, 2i + 1), Hugging Face (i, i + D/2): its converter interleaves the rows.
        # Of a Qwen2 it rotates Hugging Face's pairs.
        if self.config.model_type == "qwen2":
            return value
        return qk_to_halves(name, value, self.config.num_attention_heads, self.config.num_key_value_heads)

    def read_nf4(self, name: str) -> NF4Weight:
        raise KeyError(f"{name}: GGUF holds no NF4")

    def dtype_of(self, name: str) -> torch.dtype:
        return torch.float32

    def nbytes_of(self, name: str) -> int:
        return 4 * math.prod(self.shapes[name])  # dequantized to fp32

    def _field(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def _read_config(self) -> LlamaConfig:
        kind = self._field("general.architecture")
        if kind not in GGUF_KINDS:
            raise InputError(
                f"{self._file} holds a {kind!r} model, expected one of {', '.join(GGUF_KINDS)}: "
                "other models can't be loaded"
            )
        heads = self._field(f"{kind}.attention.head_count")
        window = self._field(f"{kind}.attention.sliding_window")
        if window and kind == "qwen2":
            raise InputError(f"{self._file} holds a qwen2 with a sliding window: expected none (use its safetensors)")
        raw: dict[str, Any] = {
            # llama.cpp calls a Mistral llama; what tells them apart is the window.
            "model_type": "mistral" if window else kind,
            "sliding_window": window or None,
            "vocab_size": self.shapes["model.embed_tokens.weight"][0],
            "hidden_size": self._field(f"{kind}.embedding_length"),
            "intermediate_size": self._field(f"{kind}.feed_forward_length"),
            "num_hidden_layers": self._field(f"{kind}.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._field(f"{kind}.attention.head_count_kv", heads),
            "head_dim": self._field(f"{kind}.attention.key_length"),
            "max_position_embeddings": self._field(f"{kind}.context_length"),
            "rms_norm_eps": self._field(f"{kind}.attention.layer_norm_rms_epsilon"),
            "rope_theta": self._field(f"{kind}.rope.freq_base", 10000.0),
            "tie_word_embeddings": "lm_head.weight" not in self.shapes,
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self.shapes,
            "mlp_bias": "model.layers.0.mlp.up_proj.bias" in self.shapes,
        }
        config = LlamaConfig.from_dict(raw | {"rope_scaling": self._read_rope(kind)}, str(self._file))
        if "rope_freqs.weight" not in self._tensors:
            return config
        factors = self._tensors["rope_freqs.weight"].data.tolist()
        expected = config.head_dim // 2
        if len(factors) != expected or not all(isinstance(value, float) and 0 < value < math.inf for value in factors):
            raise InputError(f"{self._file} has RoPE divisors that can't be, expected {expected} positive numbers")
        return LlamaConfig(**{**vars(config), "rope": {"rope_type": "factors", "factors": factors}})

    def _read_rope(self, kind: str) -> dict[str, Any] | None:
        scaling = self._field(f"{kind}.rope.scaling.type", "none")
        if scaling == "none":
            return None
        context = self._field(f"{kind}.rope.scaling.original_context_length")
        rope = {"rope_type": scaling, "factor": self._field(f"{kind}.rope.scaling.factor")}
        return rope | ({} if context is None else {"original_max_position_embeddings": context})
