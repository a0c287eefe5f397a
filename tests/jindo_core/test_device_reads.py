"""A step waits for the device once: for its loss and gradient norm.

The model lies on the meta device and the rows on the CPU, so that everything which crosses between them, or asks for a
value, shows in a dispatch mode; what a GPU's kernels launch is not here to be seen. The operators' references stand in.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jindo_core import memory, recompute
from jindo_core import step as stepping
from jindo_core.config import TrainConfig
from jindo_core.data.examples import IGNORE, Example
from jindo_core.data.packing import Pack
from jindo_core.feeder import StepRows
from jindo_core.kernels import dispatch, linear_cross_entropy
from jindo_core.lora import attach_lora
from jindo_core.memory import Relief
from jindo_core.model import LlamaConfig, LlamaForCausalLM
from jindo_core.nf4 import NF4Linear, NF4Weight
from jindo_core.paged_adamw import PagedAdamW
from jindo_core.parallel import ALONE
from jindo_core.run_state import Skipped

META = torch.device("meta")
VALUES = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select"}


class Crossings(TorchDispatchMode):
    """Notes what makes the host wait for a tensor on the meta device."""

    def __init__(self):
        self.reads = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.name().partition(".")[0]
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        on_device = first is not None and first.device == META
        to = kwargs.get("device")
        if name in VALUES and on_device:
            self.reads.append(name)
            return 0.5 if name == "aten::_local_scalar_dense" else torch.arange(4, device=META)[:, None]
        if name == "aten::_to_copy" and on_device and to is not None and torch.device(to) != META:
            self.reads.append("copy to the host")
            return torch.full(first.shape, 0.5, dtype=kwargs.get("dtype") or first.dtype)
        return func(*args, **kwargs)


def model_on_the_device():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
    )  # fmt: skip
    with META:
        model = LlamaForCausalLM(config)
    for layer in model.stack.layers:
        for owner in (layer.self_attn, layer.mlp):
            for name, linear in list(owner.named_children()):
                rows, columns = linear.weight.shape
                blocks = rows * columns // 64
                weight = NF4Weight(
                    torch.empty(rows * columns // 2, dtype=torch.uint8, device=META),
                    torch.empty(blocks, device=META), None, None, (rows, columns), torch.float32, 64,
                )  # fmt: skip
                setattr(owner, name, NF4Linear(weight))
    return attach_lora(model, 4, 8, 0.1, "all-linear").train()


@pytest.fixture
def job(monkeypatch):
    for module in (memory, recompute):  # a GPU's generator keeps its state on the host
        monkeypatch.setattr(module, "random_state", lambda _: torch.zeros(1))
        monkeypatch.setattr(module, "set_random_state", lambda *_: None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which knows no meta device
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(dispatch, "recorded", lambda _: False)  # the mode looks into the operators
    model = model_on_the_device()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = PagedAdamW(trained, lr=1e-3)
    updated = []

    def step(*, finite):  # its pages can't lie on the meta device: what it does there is held by the tests below
        assert finite, "or all gradients were looked at again"
        updated.append(finite)

    monkeypatch.setattr(optimizer, "step", step)
    relief = Relief(model, optimizer, 2)
    ids = [[(i * 7 + n) % 64 for n in range(5 + 3 * i)] for i in range(4)]
    examples = [Example(one, [IGNORE, IGNORE, *one[2:]]) for one in ids]
    return SimpleNamespace(
        model=model, optimizer=optimizer, relief=relief, tokenizer=SimpleNamespace(pad_id=0), examples=examples,
        ranks=ALONE, config=TrainConfig(base_model="m"), updated=updated, data=None,
    )  # fmt: skip


def take(job):
    crossings, view = Crossings(), SimpleNamespace(notice=print)
    rows = StepRows(job, [[0, 1], [2, 3]])
    with crossings:
        row = stepping.take_step(job, rows, 1, 10, Skipped(), view)
    return crossings, row


@pytest.mark.parametrize("kind", ["plain", "packed", "checkpointed", "embedding on the host"])
def test_a_step_reads_the_device_once(kind, job):
    if kind == "packed":
        job.examples = [Pack(one.input_ids, one.labels, (3, len(one.input_ids) - 3)) for one in job.examples]
    if kind == "checkpointed":
        job.model.stack.checkpointed_layers = 2
    if kind == "embedding on the host":
        weight = torch.zeros(64, 32)
        job.model.stack.embed_tokens.weight = torch.nn.Parameter(weight, requires_grad=False)
    crossings, row = take(job)
    assert crossings.reads == ["copy to the host"], "loss and norm together; nothing for each of two micro-batches"
    assert (row["loss"], row["grad_norm"]) == (0.5, 0.5)
    assert job.updated == [True]


def test_the_mode_sees_what_waits(job, monkeypatch):
    """Without the rows that the feeder has counted, each micro-batch's loss waits to count them."""
    monkeypatch.setattr(linear_cross_entropy, "counted", lambda labels, ignored, _: (labels != ignored).nonzero()[:, 0])
    crossings, _ = take(job)
    assert crossings.reads == ["aten::nonzero", "aten::nonzero", "copy to the host"]


def test_a_paged_update_asks_for_no_value():
    """On the CPU, whose values cost nothing to read: none is read all the same."""
    values = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name().partition(".")[0] in VALUES:
                values.append(func.name())
            return func(*args, **(kwargs or {}))

    parameter = torch.nn.Parameter(torch.ones(300))
    optimizer = PagedAdamW([parameter], lr=1e-3)
    parameter.grad = torch.ones(300)
    with Mode():
        optimizer.step(finite=True)
        assert values == []
        optimizer.step()
        assert values, "the look at the gradients that the loop leaves out"
