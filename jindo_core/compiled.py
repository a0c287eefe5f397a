"""torch.compile of the decoder layers, in training alone: what stands between the operators becomes one kernel.

One layer is compiled, with sizes that may change, and serves all of its kind; operators stay as they are, for
torch.compile sees them as torch.library has registered them. Evaluation and generation run uncompiled: a cache's length
would be compiled anew at every token.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from jindo_core.causal_lm import CausalLM
from jindo_core.config import TrainConfig
from jindo_core.errors import InputError, TrainingError
from jindo_core.memory import is_out_of_memory

MOST_VARIANTS = 16
"""Graphs of one kind of layer that torch may keep: a batch of one row or more, an input that takes gradients or (the
first layer's) does not, a checkpointed layer's two runs; and room for what a step that ran out of memory changes.
Beyond them it would run uncompiled."""


def check_compile(config: TrainConfig) -> None:
    """Raises InputError where a setting does not go with --compile."""
    if not config.compile:
        return
    reasons = {
        "packing": "the lengths of a sequence's rows would be compiled anew at every step",
        "fsdp": "a layer's weights come and go between the processes",
    }
    for name, reason in reasons.items():
        if getattr(config, name):
            raise InputError(f"--compile: got it beside --{name}, expected one of them: {reason}")


def compile_layers(model: CausalLM, *, backend: str | Callable[..., Any] = "inductor") -> None:
    """Have the model's layers compiled when training first calls them.

    Args:
        backend: torch.compile's.
    Raises:
        InputError: nothing here can compile for the model's device, or a LongLLaMA.
    The layers raise TrainingError where a graph can't be compiled; want of memory is raised as what it is.
    """
    if model.config.memory is not None:
        raise InputError("--compile: got it with a LongLLaMA, which reads its input in windows: leave --compile out")
    if backend == "inductor":
        _check_compiler(model.device)
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_VARIANTS)
    model.stack.compiled = [_compiled(layer, backend) for layer in model.stack.layers]


def _compiled(layer: nn.Module, backend: str | Callable[..., Any]) -> Callable[..., Tensor]:
    from torch._dynamo.exc import BackendCompilerFailed

    # The generator's own numbers: the same dropout as uncompiled, and as a checkpointed layer's first run.
    options: Any = {"fallback_random": True} if backend == "inductor" else None
    run = torch.compile(layer.forward, dynamic=True, backend=backend, options=options)

    def call(*args: Any, **kwargs: Any) -> Tensor:
        try:
            found: Tensor = run(*args, **kwargs)
        except BackendCompilerFailed as error:
            inner = error.inner_exception
            if is_out_of_memory(inner):  # the step gives way, and compiles again
                raise inner from error
            said = str(inner).strip().partition("\n")[0]
            raise TrainingError(f"--compile: torch.compile failed ({said}): leave --compile out") from error
        return found

    return call


def compiled_graphs() -> int:
    """Graphs that torch has compiled so far in this process: a step that adds some has taken time for them."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _check_compiler(device: torch.device) -> None:
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise InputError("--compile: Triton is not installed, which compiles for the GPU: pip install triton")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise InputError(
            "--compile: no C++ compiler is found: install g++, name one in CXX, or leave --compile out"
        ) from None
