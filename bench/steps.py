"""The whole training and decoding step of a random LLaMA, in our engine and in transformers + peft + bitsandbytes.

Both hold the same NF4 codes, made on the device. `python -m bench.steps train|decode WHO SHAPE` runs one side in a
process of its own and prints its peak memory and speed as JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import peers
from bench.cases import NF4_BYTES
from bench.shapes import FALCONS, SHAPES, FalconShape, Shape
from bench.timing import OURS, Case
from jindo_core import plan_falcon
from jindo_core.architectures import build
from jindo_core.causal_lm import CausalLM, KVCache
from jindo_core.decoding import Decoder
from jindo_core.lora import attach_lora
from jindo_core.memory import CUDA_CONTEXT
from jindo_core.nf4 import NF4Linear, NF4Weight
from jindo_core.optim import OPTIMIZERS, build_optimizer
from jindo_core.step import backward
from jindo_core.tune import elapsed, random_nf4

PEER = "peft + bitsandbytes"
# On transformers' model. The first is what a user of the peers gets: norms, embedding and head in fp32 (peft's
# prepare_model_for_kbit_training), and every layer checkpointed.
TRAINING_PEERS = {PEER: (True, True), f"{PEER}, no checkpointing": (True, False), f"{PEER}, bf16": (False, False)}
OURS_CHECKPOINTED = "jindo, checkpointed"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LOSSES_AGREE = 0.05
NEW_TOKENS = 16

Weights = Mapping[str, Tensor | NF4Weight]


def random_weights(shape: Shape | FalconShape, dtype: torch.dtype, device: torch.device) -> Weights:
    """Hugging Face's names -> random weights: NF4 codes for the layers' linears, plain tensors for the rest."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = build(shape.config())
    linears = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not model.lm_head}
    weights: dict[str, Tensor | NF4Weight] = {}
    for name, parameter in model.named_parameters():
        size = tuple(parameter.shape)
        if name in linears:
            weights[name] = random_nf4((size[0], size[1]), dtype, device)
        elif len(size) == 1:
            weights[name] = torch.ones(size, dtype=dtype, device=device)
        else:
            weights[name] = torch.randn(size, dtype=dtype, device=device).mul_(0.02)
    return weights


def _fill(model: nn.Module, weights: Weights, linear: Callable[[NF4Weight], nn.Module]) -> None:
    for name, weight in weights.items():
        path, _, leaf = name.rpartition(".")
        if isinstance(weight, NF4Weight):
            parent, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent), attribute, linear(weight))
        else:
            setattr(model.get_submodule(path), leaf, nn.Parameter(weight, requires_grad=False))


def ours(shape: Shape | FalconShape, weights: Weights, *, train: bool, checkpointing: bool = False) -> nn.Module:
    """Our model, adapted."""
    with torch.device("meta"):
        model = build(shape.config())
    _fill(model, weights, NF4Linear)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.stack.embedding.weight
    model.stack.gradient_checkpointing = checkpointing
    torch.manual_seed(1)
    return attach_lora(model.eval(), r=8, alpha=16, target_modules="all-linear").train(train)


def peer(
    shape: Shape | FalconShape,
    weights: Weights,
    *,
    train: bool,
    prepare: bool = False,
    checkpointing: bool = False,
    linear: Callable[[NF4Weight], nn.Module] | None = None,
    register: Callable[[Any], Any] = lambda config: config,
) -> nn.Module:
    """The peers' model, adapted; `prepare`: by peft's prepare_model_for_kbit_training.

    Args:
        linear: makes its layers; bitsandbytes' by default. register: what peft's configuration goes through.
    """
    peft = peers.load("peft")
    model = _their_model(shape)
    device = next(weight.device for weight in weights.values() if isinstance(weight, Tensor))
    with device:
        model.base_model.rotary_emb = type(model.base_model.rotary_emb)(model.config)
    dtype = next(weight.dtype for weight in weights.values() if isinstance(weight, Tensor))
    _fill(model, weights, linear or (lambda weight: peers.linear4bit(weight, dtype)))
    model.tie_weights()
    if prepare:
        model.is_loaded_in_4bit = True
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    elif checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    torch.manual_seed(1)
    targets = list(plan_falcon.LINEARS) if isinstance(shape, FalconShape) else TARGETS
    adapted = peft.get_peft_model(model, register(peft.LoraConfig(target_modules=targets, **peers.LORA)))
    return adapted.train(train)


def full(shape: Shape, weights: Weights) -> nn.Module:
    """The peers' model with its layers' weights in full, not adapted."""

    def linear(weight: NF4Weight) -> nn.Module:
        with torch.device("meta"):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
        return layer

    model = _their_model(shape)
    device = next(weight.device for weight in weights.values() if isinstance(weight, Tensor))
    with device:
        model.base_model.rotary_emb = type(model.base_model.rotary_emb)(model.config)
    _fill(model, {name: w if isinstance(w, NF4Weight) else w.clone() for name, w in weights.items()}, linear)
    model.tie_weights()
    return model


def _their_model(shape: Shape | FalconShape) -> Any:
    """transformers' model, on the meta device."""
    transformers = peers.load("transformers")
    common: dict[str, Any] = {
        "vocab_size": shape.vocab, "hidden_size": shape.hidden, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "max_position_embeddings": 8192, "bos_token_id": None,
        "eos_token_id": None, "pad_token_id": None, "attn_implementation": "sdpa",
    }  # fmt: skip
    with torch.device("meta"):
        if isinstance(shape, FalconShape):
            config = transformers.FalconConfig(
                ffn_hidden_size=shape.inner, new_decoder_architecture=shape.norms == 2, num_kv_heads=shape.groups,
                **common,
            )  # fmt: skip
            return transformers.FalconForCausalLM(config)
        config = transformers.LlamaConfig(
            intermediate_size=shape.inner, num_key_value_heads=shape.groups, rms_norm_eps=1e-5, **common
        )
        return transformers.LlamaForCausalLM(config)


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, back: Callable[[Tensor], None]
) -> Callable[[int], Tensor]:
    """One step of one sequence, every token supervised; returns the loss. `back`: runs the backward pass."""

    def step(_: int) -> Tensor:
        loss = model(input_ids=ids, labels=ids).loss
        back(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach().float()

    return step


def adamw_of(model: nn.Module, who: str) -> torch.optim.Optimizer:
    """Ours, or torch's, which is the peers' default."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if who.startswith(OURS):
        return build_optimizer(OPTIMIZERS[0], trained, lr=1e-5, weight_decay=0.0)
    return torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0)


def training_call(who: str, shape: Shape | FalconShape, weights: Weights, ids: Tensor) -> Callable[[int], Tensor]:
    """A training step of `jindo`, `jindo, checkpointed` or one of `TRAINING_PEERS`."""
    if who.startswith(OURS):
        model = ours(shape, weights, train=True, checkpointing=who == OURS_CHECKPOINTED)
    else:
        prepare, checkpointing = TRAINING_PEERS[who]
        model = peer(shape, weights, train=True, prepare=prepare, checkpointing=checkpointing)
    return training_step(model, adamw_of(model, who), ids, backward if who.startswith(OURS) else Tensor.backward)


def decoding_call(
    who: str, shape: Shape | FalconShape, weights: Weights, prompt: Tensor, new: int
) -> Callable[[int], Any]:
    """Greedy decoding of `new` tokens behind a prompt that is in the cache already."""
    if who == OURS:
        return _our_decoding(ours(shape, weights, train=False), prompt, new)
    return _peer_decoding(peer(shape, weights, train=False), prompt, new)


def _our_decoding(model: nn.Module, prompt: Tensor, new: int) -> Callable[[int], Any]:
    assert isinstance(model, CausalLM)
    cache = KVCache(model.config, 1, prompt.shape[1] + new, model.dtype, model.device)
    with torch.no_grad():
        first = model.lm_head(model.stack(prompt, cache=cache)[:, -1])

    decoder = Decoder(model, cache)

    @torch.no_grad()
    def run(_: int) -> Tensor:
        cache.length, logits = prompt.shape[1], first
        for _ in range(new):
            logits = decoder(logits.argmax(-1))
        return logits

    return run


def _peer_decoding(model: nn.Module, prompt: Tensor, new: int) -> Callable[[int], Any]:
    with torch.no_grad():
        start = model(input_ids=prompt, use_cache=True)
    cache, first = start.past_key_values, start.logits[:, -1]

    @torch.no_grad()
    def run(_: int) -> Tensor:
        if beyond := cache.get_seq_length() - prompt.shape[1]:
            cache.crop(-beyond)  # transformers from 5.18 on takes no positive number
        logits = first
        for _ in range(new):
            token = logits.argmax(-1, keepdim=True)
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]
        return logits

    return run


def peers_here(device: torch.device) -> bool:
    return all(peers.available(name, device) for name in ("transformers", "peft", "bitsandbytes"))


def training_flops(shape: Shape, tokens: int) -> int:
    """4 operations a frozen weight and token (forward and dX), the head's among them, and causal attention's."""
    attention = 6 * shape.layers * tokens * tokens * shape.hidden
    return 4 * tokens * (shape.linear_weights + shape.hidden * shape.vocab) + attention


def training_case(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    tokens: int,
    *,
    checkpointing: bool,
    only_first: bool = False,
) -> Case:
    """Ours (checkpointed or not) beside the peers; `only_first`: beside their default alone, for want of memory."""
    weights = random_weights(shape, dtype, device)
    ids = torch.randint(0, shape.vocab, (1, tokens), device=device)
    who = OURS_CHECKPOINTED if checkpointing else OURS
    calls = {OURS: training_call(who, shape, weights, ids)}
    if peers_here(device):
        for name in list(TRAINING_PEERS)[: 1 if only_first else None]:
            peers.add(calls, name, functools.partial(training_call, name, shape, weights, ids))
    return Case(
        "step", "training step" + (", checkpointed" if checkpointing else ""), f"{shape.name} seq {tokens}",
        training_flops(shape, tokens), "TFLOP/s", "gemm", calls, rows=tokens, tolerance=LOSSES_AGREE, tokens=tokens,
        implementation="whole step",
    )  # fmt: skip


def decoding_case(shape: Shape, dtype: torch.dtype, device: torch.device, prompt: int, new: int = NEW_TOKENS) -> Case:
    """With the adapter attached, not merged. Work: every weight once a token, and the keys and values."""
    weights = random_weights(shape, dtype, device)
    ids = torch.randint(0, shape.vocab, (1, prompt), device=device)
    calls = {OURS: decoding_call(OURS, shape, weights, ids, new)}
    if peers_here(device):
        peers.add(calls, PEER, functools.partial(decoding_call, PEER, shape, weights, ids, new))
    cache = 2 * shape.layers * shape.groups * (shape.hidden // shape.heads) * dtype.itemsize * (prompt + new // 2)
    moved = shape.linear_weights * NF4_BYTES + shape.hidden * shape.vocab * dtype.itemsize + cache
    # No comparison of results: random weights make random text, which parts after a near tie.
    return Case(
        "decoding", "decoding step", f"{shape.name} after {prompt}", new * moved, "GB/s", "read", calls, tokens=new,
        implementation="whole step",
    )  # fmt: skip


# --- one side in a process of its own -------------------------------------------------------------------


def peak_mib(device: torch.device) -> float:
    """The most that this process has held; not ru_maxrss, which a child inherits from the process that started it."""
    if device.type == "cuda":
        return (torch.cuda.max_memory_reserved(device) + CUDA_CONTEXT) / 2**20
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def alone(
    what: str, who: str, shape: Shape | FalconShape, dtype: torch.dtype, device: torch.device, tokens: int
) -> dict[str, Any]:
    """Peak memory and median speed of one side, which is all that this process holds."""
    weights = random_weights(shape, dtype, device)
    ids = torch.randint(0, shape.vocab, (1, tokens), device=device)
    run: Callable[[int], Any]
    if what == "train":
        run, counted = training_call(who, shape, weights, ids), tokens
    else:
        run, counted = decoding_call(who, shape, weights, ids, NEW_TOKENS), NEW_TOKENS
    del weights
    seconds = statistics.median(elapsed(lambda: run(0), device) for _ in range(3))
    peak = round(peak_mib(device))
    return {"what": what, "who": who, "shape": shape.name, "peak_mib": peak, "tokens_per_s": counted / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.steps")
    parser.add_argument("what", choices=["train", "decode"])
    parser.add_argument("who", choices=[OURS, OURS_CHECKPOINTED, *TRAINING_PEERS])
    parser.add_argument("shape", choices=[*SHAPES, *FALCONS])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args()
    dtype, device = getattr(torch, given.dtype), torch.device(given.device)
    print(json.dumps(alone(given.what, given.who, (SHAPES | FALCONS)[given.shape], dtype, device, given.tokens)))


if __name__ == "__main__":
    main()
