"""A training step with --compile beside one without: seconds of each, in turns, and what compiling took.

    python -m bench.compiled_step [--base_model MODEL] [--batch B] [--tokens T ...] [--dtype D] [--steps N]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from jindo_core.causal_lm import CausalLM
from jindo_core.compiled import compile_layers
from jindo_core.hub import resolve_model
from jindo_core.loader import load_model
from jindo_core.lora import attach_lora
from jindo_core.step import backward


def step(model: CausalLM, batch: int, tokens: int) -> float:
    """Seconds of a forward and a backward pass; the optimizer's step is the same in both."""
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
    began = time.perf_counter()
    loss = model(ids.to(model.device), labels=ids.to(model.device)).loss
    assert loss is not None
    backward(loss)
    loss.item()
    took = time.perf_counter() - began
    model.zero_grad(set_to_none=True)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.compiled_step", allow_abbrev=False)
    parser.add_argument("--base_model")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[96, 128, 160])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=9)
    asked = parser.parse_args()
    torch.manual_seed(0)
    model = load_model(resolve_model(asked.base_model), dtype=asked.dtype, device=asked.device)
    attach_lora(model, 8, 16, 0.05, "all-linear").train()
    began = time.perf_counter()
    compile_layers(model)
    compiled = model.stack.compiled
    for tokens in asked.tokens[:2]:
        step(model, asked.batch, tokens)
    print(f"compiling and two steps: {time.perf_counter() - began:.1f} s, {model.dtype} on {model.device}")
    model.stack.compiled = None
    step(model, asked.batch, asked.tokens[0])
    ratios = []
    for number in range(asked.steps):
        tokens, seconds = asked.tokens[number % len(asked.tokens)], {}
        for kind in (False, True) if number % 2 else (True, False):
            model.stack.compiled = compiled if kind else None
            seconds[kind] = step(model, asked.batch, tokens)
        ratios.append(seconds[False] / seconds[True])
    print(f"compiled is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
