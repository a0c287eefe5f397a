"""The peers, as their users call them. One that is not installed, or does not import here, is left out."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jindo_core.nf4 import NF4Weight

Call = Callable[[int], Any]
# unsloth and liger need a GPU; unsloth patches transformers when it is imported, so it comes where it is called.
MODULES = {"bitsandbytes": "", "peft": "", "transformers": "", "torchao": "", "unsloth": "cuda", "liger_kernel": "cuda"}
LORA = {"r": 8, "lora_alpha": 16}

# A machine without a network may have bitsandbytes in a folder.
if folder := os.environ.get("JINDO_BITSANDBYTES"):
    sys.path.append(folder)


@functools.cache
def load(name: str) -> Any:
    """The module, or the reason (a string) why there is none."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 - unsloth raises many kinds; the reason is kept and reported
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def available(name: str, device: torch.device) -> bool:
    """Whether the peer can be called for `device`."""
    needs = MODULES[name]
    return (not needs or device.type == needs) and not isinstance(load(name), str)


def add(calls: dict[str, Call], name: str, build: Callable[[], Call]) -> None:
    """Put a peer's call among the others; one that can't be made raises when it is called, and the row says so."""
    try:
        calls[name] = build()
    except Exception as error:  # noqa: BLE001 - an old version, or too little memory: whatever it is, it is reported
        why = f"{type(error).__name__}: {error}"

        def fail(_: int) -> None:
            raise RuntimeError(why)

        calls[name] = fail


def versions() -> dict[str, str]:
    """Peer -> its version, or why it is not here. Those that need a GPU are not imported for it."""
    found = {}
    for name, needs in MODULES.items():
        try:
            said = version(name.replace("_", "-"))
        except PackageNotFoundError:
            said = "not installed"
        if not needs and (said != "not installed" or name == "bitsandbytes"):
            module = load(name)
            said = module if isinstance(module, str) else getattr(module, "__version__", said)
        found[name] = said
    return found


# --- NF4 ------------------------------------------------------------------------------------------------


def quant_state(weight: NF4Weight) -> Any:
    """bitsandbytes' QuantState of the same weight."""
    state = dict(weight.state_dict())
    state.pop("weight")
    return load("bitsandbytes").functional.QuantState.from_dict(state, device=weight.packed.device)


def dequantize(weights: Sequence[NF4Weight], dtype: torch.dtype) -> dict[str, Call]:
    """Into a new tensor. torchao quantizes a weight of its own of that shape: its format differs."""
    device, count = weights[0].packed.device, len(weights)

    def bitsandbytes() -> Call:
        run, states = load("bitsandbytes").functional.dequantize_4bit, [quant_state(w) for w in weights]
        return lambda turn: run(weights[turn % count].packed, states[turn % count])

    def torchao() -> Call:
        to_nf4 = _torchao_to_nf4()
        own = [to_nf4(torch.randn(w.shape, dtype=dtype, device=device), 64, 256) for w in weights]
        return lambda turn: own[turn % count].get_original_weight()

    return _collect(device, bitsandbytes=bitsandbytes, torchao=torchao)


def _torchao_to_nf4() -> Callable[..., Any]:
    """torchao's quantizer, which moved in 0.18."""
    try:
        return importlib.import_module("torchao.quantization.quantize_.workflows.nf4.nf4_tensor").to_nf4
    except ModuleNotFoundError:
        return importlib.import_module("torchao.dtypes.nf4tensor").to_nf4


def _collect(device: torch.device, **builders: Callable[[], Call]) -> dict[str, Call]:
    calls: dict[str, Call] = {}
    for name, build in builders.items():
        if available(name, device):
            add(calls, name, build)
    return calls


def dequantize_into(weights: Sequence[NF4Weight], out: Tensor) -> dict[str, Call]:
    """Into a buffer that is used again."""
    count = len(weights)

    def bitsandbytes() -> Call:
        states = [quant_state(w) for w in weights]
        if out.device.type != "cpu":
            return lambda turn: _bitsandbytes_out(weights[turn % count].packed, states[turn % count], out)
        # Its wrapper has no such form on the CPU. Its C entry takes fp32 maxima: less to do than ours has.
        write = _bitsandbytes_c_entry(out)
        for state in states:
            state.absmax = _plain_absmax(state)
        return lambda turn: write(weights[turn % count].packed, states[turn % count])

    def unsloth() -> Call:
        fast = importlib.import_module("unsloth.kernels.utils").fast_dequantize
        states = [quant_state(w) for w in weights]
        return lambda turn: fast(weights[turn % count].packed, states[turn % count], out=out)

    return _collect(out.device, bitsandbytes=bitsandbytes, unsloth=unsloth)


def _plain_absmax(state: Any) -> Tensor:
    return load("bitsandbytes").functional.dequantize_blockwise(state.absmax, state.state2) + state.offset


def _bitsandbytes_out(packed: Tensor, state: Any, out: Tensor) -> Tensor:
    torch.ops.bitsandbytes.dequantize_4bit.out(
        packed, _plain_absmax(state), state.blocksize, "nf4", state.shape, out.dtype, out=out
    )
    return out


def _bitsandbytes_c_entry(out: Tensor) -> Callable[[Tensor, Any], Tensor]:
    import ctypes

    lib = importlib.import_module("bitsandbytes.cextension").lib
    suffix = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[out.dtype]
    entry = getattr(lib, f"cdequantize_blockwise_cpu_nf4_{suffix}")

    def write(packed: Tensor, state: Any) -> Tensor:
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (packed, state.absmax, out))
        entry(*pointers, *(ctypes.c_longlong(n) for n in (state.blocksize, *out.shape)))
        return out

    return write


def quantize(weights: Sequence[Tensor]) -> dict[str, Call]:
    """With double quantization."""
    count = len(weights)

    def bitsandbytes() -> Call:
        run = load("bitsandbytes").functional.quantize_4bit
        return lambda turn: run(weights[turn % count], quant_type="nf4", compress_statistics=True)[0].view(-1, 1)

    def torchao() -> Call:
        to_nf4 = _torchao_to_nf4()
        return lambda turn: to_nf4(weights[turn % count], 64, 256)

    return _collect(weights[0].device, bitsandbytes=bitsandbytes, torchao=torchao)


# --- LoRA linear ----------------------------------------------------------------------------------------


def linear4bit(weight: NF4Weight, dtype: torch.dtype) -> nn.Module:
    """bitsandbytes' layer on the same codes."""
    bnb, (n, k), device = load("bitsandbytes"), weight.shape, weight.packed.device
    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=dtype, quant_type="nf4")
    stats = dict(weight.state_dict())
    stats.pop("weight")
    layer.weight = bnb.nn.Params4bit.from_prequantized(weight.packed, stats, device=device, module=layer)
    return layer


def lora_layers(weights: Sequence[NF4Weight], lora_A: Tensor, lora_B: Tensor) -> list[nn.Module]:
    """peft's LoRA on bitsandbytes' layer, with the given adapter."""
    peft = load("peft")
    layers = []
    for weight in weights:
        holder = nn.ModuleDict({"proj": linear4bit(weight, weight.dtype)})
        config = peft.LoraConfig(target_modules=["proj"], **LORA)
        layer = peft.inject_adapter_in_model(config, holder)["proj"]
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(lora_A)
            layer.lora_B["default"].weight.copy_(lora_B)
        layers.append(layer)
    return layers


# --- the elementwise operators, as transformers writes them, and Liger's ----------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q, k [B, H, T, D] and cos, sin [B, 1, T, D] of x's dtype: transformers' apply_rotary_pos_emb."""

    def half(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((-b, a), dim=-1)

    return q * cos + half(q) * sin, k * cos + half(k) * sin


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), labels)


def liger(device: torch.device, operator: str) -> dict[str, Callable[..., Any]]:
    """Liger's operator of our name, with our arguments; nothing where it does not import."""
    if not available("liger_kernel", device):
        return {}
    module = "fused_linear_cross_entropy" if operator == "linear_cross_entropy" else operator

    def ops() -> Any:
        return importlib.import_module(f"liger_kernel.ops.{module}")

    calls: dict[str, Callable[..., Any]] = {
        "rms_norm": lambda x, w, eps: ops().LigerRMSNormFunction.apply(x, w, eps, 0.0, "llama", False),
        "rope": lambda q, k, cos, sin: ops().LigerRopeFunction.apply(q, k, cos[:, 0], sin[:, 0]),
        "swiglu": lambda gate, up: ops().LigerSiLUMulFunction.apply(gate, up),
        "linear_cross_entropy": lambda h, w, y: ops().LigerFusedLinearCrossEntropyFunction.apply(h, w, y)[0],
    }
    return {"liger": calls[operator]}
