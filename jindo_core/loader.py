"""Load a model: read tensor by tensor, quantize each as it comes, so that the peak is the quantized model
and one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from jindo_core.errors import InputError
from jindo_core.formats import Checkpoint, missing_and_extra, open_checkpoint
from jindo_core.hub import resolve_model
from jindo_core.memory import give_back_freed
from jindo_core.model import LlamaForCausalLM
from jindo_core.nf4 import NF4Linear, quantize_nf4
from jindo_core.plan import spread
from jindo_core.streaming import LayerStream

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def load_model(
    path: str | Path | None,
    *,
    quantize: str | None = "nf4",
    double_quant: bool = True,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "auto",
    offload_layers: int = 0,
    offload_embedding: bool = False,
    offload_folder: str | Path = "host",
) -> LlamaForCausalLM:
    """Load a LLaMA, ready for `attach_lora`, `load_adapter` or `generate`.

    Args:
        path: a folder in Hugging Face's layout (safetensors, single or sharded), a .gguf file, a Hub id, or
            None for the embedded SmolLM2-135M.
        quantize: "nf4": the layers' linear weights in 4 bits; None: everything in `dtype`.
        double_quant: also quantize the block maxima (4.127 instead of 4.5 bits a weight).
        dtype: of activations, embedding, norms and head: "bf16", "fp32", "fp16", a torch dtype, or "auto":
            bf16 where the hardware computes in it, fp32 elsewhere.
        device: "cpu", "cuda", "cuda:1", or "auto": the GPU if there is one.
        offload_layers: so many layers' NF4 weights lie in the host's memory and are streamed (`LayerStream`), so that a
            model may be larger than the device.
        offload_embedding: the input embedding stays in the host's memory; not where it is the head too.
        offload_folder: where streamed layers lie: "host" (RAM), or a folder for a memory-mapped file.
    Returns:
        The model in eval mode, all parameters frozen.
    Raises:
        InputError: what is wrong with the path, a file or a tensor; nothing was loaded then.
    """
    if quantize not in ("nf4", "none", None):
        raise InputError(f"quantize is {quantize!r}, expected 'nf4' or None")
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    resolved = resolve_model(None if path is None else str(path))
    checkpoint = open_checkpoint(resolved)
    with torch.device("meta"):
        model = LlamaForCausalLM(checkpoint.config)
    check_tensors(model, checkpoint, resolved)
    if offload_layers:
        _check_offload(offload_layers, model.config.num_hidden_layers, quantize)
        model.model.stream = LayerStream(device, offload_folder)
    streamed = spread(offload_layers, model.config.num_hidden_layers)
    on_host = offload_embedding and not model.config.tie_word_embeddings
    _fill(model, checkpoint, quantize == "nf4", double_quant, dtype, device, streamed, on_host)
    give_back_freed()
    return model.requires_grad_(False).eval()


def pick_device(device: torch.device | str) -> torch.device:
    """The device that is meant; "auto" is the GPU if there is one. InputError where it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise InputError(f"device is {device!r}, expected auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count()
        raise InputError(f"device is {chosen}, but torch sees {seen} CUDA devices: use --device cpu")
    return chosen


def pick_dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    """The dtype that is meant; "auto" is bf16 where `device` computes in it, else fp32."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if _computes_bf16(device) else torch.float32
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}, expected auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # On other CPUs torch emulates bf16 products, several times slower than fp32.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def check_tensors(model: nn.Module, checkpoint: Checkpoint, source: Path) -> None:
    """See that a checkpoint holds the tensors of a model, which may be on the meta device, in their shapes.

    Raises:
        InputError: one is missing, misshapen or belongs to no part of the model; `source` names the checkpoint.
    """
    expected = {name: tuple(value.shape) for name, value in model.named_parameters()}
    # Old LLaMA checkpoints carry their rotary frequencies; a tied head may be stored a second time.
    tied = "lm_head.weight" not in expected
    faults = list(
        missing_and_extra(
            expected,
            checkpoint,
            ignore=lambda name: name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"),
        )
    )
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise InputError(f"{source}: {faults[0]}{more}: the checkpoint does not fit its configuration")


def _layer_of(name: str) -> int:
    """Of a parameter's name; -1 where it is in no layer."""
    pieces = name.split(".")
    return int(pieces[2]) if pieces[:2] == ["model", "layers"] else -1


def _check_offload(layers: int, available: int, quantize: str | None) -> None:
    if not 0 <= layers <= available:
        raise InputError(f"offload_layers is {layers}, expected 0 to {available}, the model's layers")
    if quantize != "nf4":
        raise InputError("offload_layers needs quantize 'nf4': only NF4 layers are streamed")


def _fill(
    model: LlamaForCausalLM,
    checkpoint: Checkpoint,
    nf4: bool,
    double_quant: bool,
    dtype: torch.dtype,
    device: torch.device,
    streamed: Sequence[int],
    embedding_on_host: bool,
) -> None:
    """Replace every meta parameter by its tensor, and the layers' linears by quantized ones; a layer that is to be
    streamed leaves the device as soon as it is complete."""
    quantized = {
        f"{path}.weight" for path, module in model.model.named_modules(prefix="model") if isinstance(module, nn.Linear)
    }
    names = [name for name, _ in model.named_parameters()]
    last_of = {_layer_of(name): name for name in names}
    for name in names:
        on_host = embedding_on_host and name == "model.embed_tokens.weight"
        value: Tensor = checkpoint.read(name).to("cpu" if on_host else device)
        path, _, leaf = name.rpartition(".")
        if nf4 and name in quantized:
            new = NF4Linear(quantize_nf4(value, double_quant=double_quant))
            # The bias is still on meta, and filled when its own turn comes.
            new.register_parameter("bias", model.get_submodule(path)._parameters["bias"])
            parent, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent), attribute, new)
        else:
            # A copy even where nothing changes: `value` may lie in the checkpoint's mapped file.
            copied = value.to(dtype, copy=True)
            setattr(model.get_submodule(path), leaf, nn.Parameter(copied, requires_grad=False))
        layer = _layer_of(name)
        if layer in streamed and last_of[layer] == name and model.model.stream is not None:
            model.model.stream.take(layer, model.model.layers[layer])
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
