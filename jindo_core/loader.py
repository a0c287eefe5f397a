"""Load a model: read tensor by tensor, quantize each as it comes, so that the peak is the quantized model
and one tensor."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jindo_core.architectures import build, model_class
from jindo_core.causal_lm import CausalLM
from jindo_core.errors import InputError
from jindo_core.formats import Checkpoint, missing_and_extra, open_checkpoint
from jindo_core.head import StreamedHead
from jindo_core.hub import resolve_model
from jindo_core.memory import give_back_freed
from jindo_core.nf4 import NF4Linear, NF4Weight, is_finite, quantize_nf4
from jindo_core.parallel import ALONE, Ranks
from jindo_core.plan import spread
from jindo_core.streaming import LayerStream

DEVICE_TYPES = ("cpu", "cuda")
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
    offload_head: bool = False,
    offload_folder: str | Path = "host",
    on_progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> CausalLM:
    """Load a model, ready for `attach_lora`, `load_adapter` or `generate`.

    Args:
        path: a folder in Hugging Face's layout (safetensors or .bin, single or sharded, 16 bits or NF4) or in Meta's
            (params.json), a .gguf file, a Hub id, or None for the embedded SmolLM2-135M.
        quantize: "nf4": the layers' linear weights in 4 bits; None: everything in `dtype`. What lies in NF4 is taken
            as it is by "nf4", its 16-bit linears too, and dequantized by None.
        double_quant: also quantize the block maxima (4.127 instead of 4.5 bits a weight); NF4 checkpoints have it or
            not.
        dtype: of activations, embedding, norms and head: "bf16", "fp32", "fp16", a torch dtype, or "auto":
            bf16 where the hardware computes in it, fp32 elsewhere.
        device: "cpu", "cuda", "cuda:1", or "auto": the GPU if there is one.
        offload_layers: so many layers' NF4 weights lie in the host's memory and are streamed (`LayerStream`), so that a
            model may be larger than the device.
        offload_embedding: the input embedding stays in the host's memory; not where it is the head too.
        offload_head: the head lies there, streamed in slices (`StreamedHead`); where it is the embedding, both do.
        offload_folder: where streamed layers and the head lie: "host" (RAM), or a folder for a memory-mapped file.
        on_progress: called with (bytes read, bytes in all) after every tensor.
        ranks: the processes that load it together: a layer is sharded as soon as it is complete, where they say so.
    Returns:
        The model in eval mode, all parameters frozen.
    Raises:
        InputError: what is wrong with the path, a file or a tensor; nothing was loaded then.
    """
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    _check_options(quantize, double_quant, offload_layers, offload_embedding, offload_head, offload_folder)
    resolved = resolve_model(None if path is None else str(path))
    checkpoint = open_checkpoint(resolved)
    model = build_empty(checkpoint, resolved)
    if offload_layers:
        _check_offload(offload_layers, model.config.num_hidden_layers, quantize)
        model.stack.stream = LayerStream(device, offload_folder)
    streamed = spread(offload_layers, model.config.num_hidden_layers)
    on_host = _kept_on_host(model, offload_embedding, offload_head)
    fill = _Fill(model, checkpoint, quantize == "nf4", double_quant, dtype, device, streamed, on_host, ranks)
    fill.run(on_progress)
    if offload_head:
        model.lm_head = StreamedHead(model.lm_head.weight, device, offload_folder)
    give_back_freed()
    return model.requires_grad_(False).eval()


def build_empty(checkpoint: Checkpoint, source: Path) -> CausalLM:
    """A checkpoint's model on the meta device, its tensors seen to be there in their shapes; nothing is read.

    Raises:
        InputError: the checkpoint does not fit its configuration; `source` names it.
    """
    _check_layers(checkpoint, source)
    with torch.device("meta"):
        model = build(checkpoint.config)
    check_tensors(model, checkpoint, source)
    return model


def _check_layers(checkpoint: Checkpoint, source: Path) -> None:
    """See that there is something of every layer before any is built: a number in a file may be any."""
    prefix = f"{model_class(checkpoint.config).LAYERS}."
    held = {name.removeprefix(prefix).partition(".")[0] for name in checkpoint.shapes if name.startswith(prefix)}
    count = checkpoint.config.num_hidden_layers
    missing = next((layer for layer in range(count) if str(layer) not in held), None)
    if missing is not None:
        raise InputError(
            f"{source}: the tensor {prefix}{missing}.* is missing, of {count} layers: the checkpoint does not fit its "
            "configuration"
        )


def _kept_on_host(model: CausalLM, offload_embedding: bool, offload_head: bool) -> set[str]:
    """Names of the weights outside the layers that stay in the host's memory."""
    names = {"lm_head.weight"} if offload_head else set()
    if offload_head if model.config.tie_word_embeddings else offload_embedding:
        names.add(f"{model.EMBEDDING}.weight")
    return names


def _check_options(
    quantize: Any, double_quant: Any, layers: Any, embedding: Any, head: Any, folder: Any
) -> None:
    """See that `load_model`'s options are of their types. Raises InputError."""
    if quantize not in ("nf4", "none", None):
        raise InputError(f"quantize is {quantize!r}, expected 'nf4' or None")
    switches = {"double_quant": double_quant, "offload_embedding": embedding, "offload_head": head}
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise InputError(f"{name} is {value!r}, expected True or False")
    if type(layers) is not int:
        raise InputError(f"offload_layers is {layers!r}, expected a whole number")
    if not isinstance(folder, str | Path):
        raise InputError(f"offload_folder is {folder!r}, expected 'host' or a folder")


def pick_device(device: torch.device | str) -> torch.device:
    """The device that is meant; "auto" is the GPU if there is one. InputError where it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device) if isinstance(device, str | torch.device) else None
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in DEVICE_TYPES:
        raise InputError(f"device is {str(device)!r}, expected auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count()
        raise InputError(f"device is {chosen}, but torch sees {seen} CUDA devices: use --device cpu")
    return chosen


def pick_dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    """The dtype that is meant; "auto" is bf16 where `device` computes in it, else fp32. InputError for any other than
    those in `DTYPES`."""
    if isinstance(dtype, str) and dtype == "auto":
        return torch.bfloat16 if _computes_bf16(device) else torch.float32
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in DTYPES.values():
        raise InputError(f"dtype is {dtype!r}, expected auto, {', '.join(DTYPES)}")
    assert isinstance(chosen, torch.dtype)
    return chosen


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


def _layer_of(name: str, layers: str) -> int:
    """Of a parameter's name; -1 where it is in none of the layers at the path `layers`."""
    inside = name.removeprefix(f"{layers}.")
    return int(inside.partition(".")[0]) if inside != name else -1


def _check_offload(layers: int, available: int, quantize: str | None) -> None:
    if not 0 <= layers <= available:
        raise InputError(f"offload_layers is {layers}, expected 0 to {available}, the model's layers")
    if quantize != "nf4":
        raise InputError("offload_layers needs quantize 'nf4': only NF4 layers are streamed")


class _Fill:
    """Replaces every meta parameter by its tensor, and the layers' linears by quantized ones; a layer that is to be
    streamed leaves the device as soon as it is complete."""

    def __init__(
        self,
        model: CausalLM,
        checkpoint: Checkpoint,
        nf4: bool,
        double_quant: bool,
        dtype: torch.dtype,
        device: torch.device,
        streamed: Sequence[int],
        on_host: Set[str],
        ranks: Ranks,
    ) -> None:
        self.model, self.checkpoint, self.ranks = model, checkpoint, ranks
        self.double_quant, self.dtype, self.device = double_quant, dtype, device
        self.streamed, self.on_host = streamed, on_host
        linears = {
            f"{path}.weight"
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not model.lm_head
        }
        # A checkpoint that was quantized says itself which linears were left out.
        chosen = linears & checkpoint.quantized if checkpoint.quantized else linears
        self.to_quantize = chosen if nf4 else set()
        self.as_they_are = self.to_quantize & checkpoint.quantized

    def run(self, on_progress: Callable[[int, int], None] | None) -> None:
        names = [name for name, _ in self.model.named_parameters()]
        last_of = {_layer_of(name, self.model.LAYERS): name for name in names}
        whole, done = sum(self.checkpoint.nbytes_of(name) for name in names), 0
        with closing(self._read_ahead(names)) as pieces:
            for name, value in pieces:
                self._place(name, value)
                del value  # before the next one is waited for
                layer, stream = _layer_of(name, self.model.LAYERS), self.model.stack.stream
                if layer in self.streamed and last_of[layer] == name and stream is not None:
                    stream.take(layer, self.model.stack.layers[layer])
                elif layer >= 0 and last_of[layer] == name:
                    self.ranks.shard(self.model.stack.layers[layer])
                done += self.checkpoint.nbytes_of(name)
                if on_progress is not None:
                    on_progress(self.checkpoint.nbytes * done // whole, self.checkpoint.nbytes)
        if self.model.config.tie_word_embeddings:
            self.model.lm_head.weight = self.model.stack.embedding.weight

    def _read_ahead(self, names: Sequence[str]) -> Generator[tuple[str, Tensor | NF4Weight]]:
        """Every tensor, read on a thread while the one before it is quantized; both together never take more than the
        largest alone would."""
        sizes = [self.checkpoint.nbytes_of(name) for name in names]
        room = max(sizes)
        with ThreadPoolExecutor(1, "jindo-read") as thread:
            coming: Future[Tensor | NF4Weight] | None = None
            for number, name in enumerate(names):
                value = (coming or thread.submit(self._read, name)).result()
                follows = number + 1 < len(names) and sizes[number] + sizes[number + 1] <= room
                coming = thread.submit(self._read, names[number + 1]) if follows else None
                yield name, value
                del value

    def _read(self, name: str) -> Tensor | NF4Weight:
        if name in self.as_they_are:
            return self.checkpoint.read_nf4(name)
        value = self.checkpoint.read(name)
        if not is_finite(value):
            raise InputError(f"the tensor {name} has values that are NaN or infinite: download the checkpoint again")
        return value

    def _place(self, name: str, value: Tensor | NF4Weight) -> None:
        """Put a tensor where it belongs in the model, quantized where it is to be."""
        path, _, leaf = name.rpartition(".")
        if name not in self.to_quantize:
            assert isinstance(value, Tensor)
            moved = value.to("cpu" if name in self.on_host else self.device, self.dtype)
            if moved.dtype != value.dtype:
                _check_range(name, moved, self.dtype)
            setattr(self.model.get_submodule(path), leaf, nn.Parameter(moved, requires_grad=False))
            return
        if isinstance(value, Tensor):
            weight = self.ranks.same_constants(quantize_nf4(value.to(self.device), double_quant=self.double_quant))
            if value.dtype == torch.float64:  # a block's maximum is kept in fp32
                scales = weight.absmax if weight.nested_absmax is None else weight.nested_absmax
                _check_range(name, scales, torch.float32)
        else:
            weight = value.to(self.device)
        new = NF4Linear(weight)
        # The bias is still on meta, and filled when its own turn comes.
        new.register_parameter("bias", self.model.get_submodule(path)._parameters["bias"])
        parent, _, attribute = path.rpartition(".")
        setattr(self.model.get_submodule(parent), attribute, new)


def _check_range(name: str, kept: Tensor, dtype: torch.dtype) -> None:
    """See that a tensor of finite values still has none that is not, in the dtype it is kept in. Raises InputError."""
    if not is_finite(kept):
        short = next(short for short, known in DTYPES.items() if known == dtype)
        raise InputError(f"the tensor {name} has values too large for {short}: give --dtype bf16 or fp32")
