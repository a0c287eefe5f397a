"""Checkpoints on disk, read one tensor at a time under Hugging Face's names: safetensors and GGUF."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from jindo_core.errors import InputError
from jindo_core.model import LlamaConfig

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Checkpoint(Protocol):
    """A model's configuration and its tensors.

    `shapes` maps every tensor's name to its shape, known without reading data; `read` gives one tensor.
    """

    config: LlamaConfig
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> Tensor: ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a .gguf file, or a folder with config.json and safetensors.

    Raises:
        InputError: neither, a corrupt file, or an unknown architecture; names the file and the tensor.
    """
    return GGUFCheckpoint(path) if path.suffix == ".gguf" else SafetensorsCheckpoint(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: copy it there from where the folder came from") from None
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): expected a JSON file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


# --- safetensors ----------------------------------------------------------------------------------------


class SafetensorsCheckpoint:
    """A folder in Hugging Face's layout: config.json and one model.safetensors, or an index and its shards."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
            raise InputError(f"{folder} is a LoRA adapter: give it as --lora_weights, and its base as --base_model")
        self.config = LlamaConfig.from_dict(read_json(folder / "config.json"))
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        for file, names in _shards(folder).items():
            opened = self._open(file)
            held = set(opened.keys())
            if names is not None and names != held:
                odd = sorted(names ^ held)[0]
                fault = "lacks" if odd in names else "holds, beyond what the index says,"
                raise InputError(f"{file} {fault} the tensor {odd}: download the checkpoint again")
            for name in sorted(held):
                piece = opened.get_slice(name)
                if name in self._files:
                    raise InputError(f"the tensor {name} is in two shards of {folder}")
                if piece.get_dtype() not in FLOATS:
                    raise InputError(
                        f"the tensor {name} in {file} is of type {piece.get_dtype()}, expected {', '.join(FLOATS)}"
                    )
                self._files[name] = file
                self.shapes[name] = tuple(piece.get_shape())

    def read(self, name: str) -> Tensor:
        # Opened for each tensor: the file's pages that were read stay in memory as long as its mapping does.
        with self._open(self._files[name]) as opened:
            return opened.get_tensor(name)

    @staticmethod
    def _open(file: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(file, framework="pt")
        except FileNotFoundError:
            raise InputError(f"{file} is missing: download the checkpoint again") from None
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is truncated or corrupt ({error}): download it again") from None


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """Each file of the checkpoint and the tensors it should hold (None: whatever it holds)."""
    if (folder / SINGLE).exists():
        return {folder / SINGLE: None}
    if not (folder / INDEX).exists():
        raise InputError(f"{folder} holds neither {SINGLE} nor {INDEX}: expected safetensors (.bin can't be read)")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{folder / INDEX} has no weight_map: download it again")
    shards: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        # A name only, never a path: an index from elsewhere must not make us read outside its folder.
        if not isinstance(file, str) or file != re.sub(r"[/\\\0]", "", file) or file in ("", ".", ".."):
            raise InputError(f"{folder / INDEX} places {name} in {file!r}, expected the name of a file beside it")
        names = shards.setdefault(folder / file, set())
        assert names is not None
        names.add(name)
    return shards


# --- GGUF -----------------------------------------------------------------------------------------------

GGUF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
GGUF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GGUF_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
# What the gguf package raises on a file that is cut short or is no GGUF.
GGUF_FAULTS = (ValueError, KeyError, IndexError, OverflowError, UnicodeDecodeError)


def gguf_to_hf_name(name: str) -> str:
    """A tensor's name in a LLaMA GGUF -> Hugging Face's; an unknown one unchanged."""
    if name in GGUF_NAMES:
        return GGUF_NAMES[name]
    if (found := GGUF_LAYER.fullmatch(name)) and found[2] in GGUF_LAYER_NAMES:
        return f"model.layers.{found[1]}.{GGUF_LAYER_NAMES[found[2]]}.{found[3]}"
    return name


class GGUFCheckpoint:
    """A LLaMA in llama.cpp's format, dequantized tensor by tensor as it is read."""

    def __init__(self, file: Path) -> None:
        from gguf import GGUFReader

        self._file = file
        try:
            self._reader = GGUFReader(file)
            self._tensors = {gguf_to_hf_name(tensor.name): tensor for tensor in self._reader.tensors}
            self.shapes = {
                name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self._tensors.items()
            }
            self.config = self._read_config()
        except InputError:
            raise
        except GGUF_FAULTS as error:
            raise InputError(f"{file} is truncated or no GGUF file ({error}): download it again") from None
        self.shapes.pop("rope_freqs.weight", None)  # read into the configuration

    def read(self, name: str) -> Tensor:
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, *GGUF_FAULTS) as error:
            raise InputError(f"the tensor {name} in {self._file} can't be read: {error}") from None
        value = torch.from_numpy(values.copy() if not values.flags.writeable else values)
        # llama.cpp rotates pairs (2i, 2i + 1), Hugging Face (i, i + D/2): its converter interleaves the rows.
        if ".q_proj." in name:
            return _deinterleave(value, self.config.num_attention_heads)
        if ".k_proj." in name:
            return _deinterleave(value, self.config.num_key_value_heads)
        return value

    def _field(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def _read_config(self) -> LlamaConfig:
        kind = self._field("general.architecture")
        if kind != "llama":
            raise InputError(f"{self._file} holds a {kind!r} model, expected 'llama': other models can't be loaded")
        heads = self._field("llama.attention.head_count")
        raw: dict[str, Any] = {
            "model_type": "llama",
            "vocab_size": self.shapes["model.embed_tokens.weight"][0],
            "hidden_size": self._field("llama.embedding_length"),
            "intermediate_size": self._field("llama.feed_forward_length"),
            "num_hidden_layers": self._field("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._field("llama.attention.head_count_kv", heads),
            "head_dim": self._field("llama.attention.key_length"),
            "max_position_embeddings": self._field("llama.context_length"),
            "rms_norm_eps": self._field("llama.attention.layer_norm_rms_epsilon"),
            "rope_theta": self._field("llama.rope.freq_base", 10000.0),
            "tie_word_embeddings": "lm_head.weight" not in self.shapes,
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self.shapes,
        }
        config = LlamaConfig.from_dict(raw | {"rope_scaling": self._read_rope()})
        if "rope_freqs.weight" in self._tensors:
            factors = self._tensors["rope_freqs.weight"].data.tolist()
            return LlamaConfig(**{**vars(config), "rope": {"rope_type": "factors", "factors": factors}})
        return config

    def _read_rope(self) -> dict[str, Any] | None:
        kind = self._field("llama.rope.scaling.type", "none")
        if kind == "none":
            return None
        context = self._field("llama.rope.scaling.original_context_length")
        rope = {"rope_type": kind, "factor": self._field("llama.rope.scaling.factor")}
        return rope | ({} if context is None else {"original_max_position_embeddings": context})


def _deinterleave(value: Tensor, heads: int) -> Tensor:
    """[heads * D, ...] with rows (0, D/2, 1, D/2 + 1, …) in each head -> rows in order."""
    pairs = value.view(heads, -1, 2, *value.shape[1:])
    return pairs.transpose(1, 2).reshape(value.shape)


def missing_and_extra(
    expected: dict[str, tuple[int, ...]], checkpoint: Checkpoint, ignore: Callable[[str], bool]
) -> Iterator[str]:
    """One sentence for every tensor that is missing, not known, or of another shape."""
    for name, shape in expected.items():
        if name not in checkpoint.shapes:
            yield f"the tensor {name} is missing"
        elif checkpoint.shapes[name] != shape:
            yield f"the tensor {name} has shape {checkpoint.shapes[name]}, expected {shape}"
    for name in checkpoint.shapes:
        if name not in expected and not ignore(name):
            yield f"the tensor {name} belongs to no part of the model"
