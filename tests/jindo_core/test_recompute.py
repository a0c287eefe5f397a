"""Gradient checkpointing: the same numbers, from less that is kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from jindo_core.lora import attach_lora
from jindo_core.model import LlamaConfig, LlamaForCausalLM
from jindo_core.nf4 import NF4Linear
from jindo_core.pager import Pager
from jindo_core.recompute import CheckpointOffload, recomputed

CONFIG = LlamaConfig(
    vocab_size=97, hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32,
)  # fmt: skip


def make_model(dropout):
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    for module in list(model.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, NF4Linear.from_linear(child))
    attach_lora(model, r=4, alpha=8, dropout=dropout, target_modules="all-linear").train()
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_loss_and_gradients_are_the_same_bit_for_bit(dropout):
    model = make_model(dropout)
    ids = torch.randint(97, (2, 17), generator=torch.Generator().manual_seed(1))
    trained = [p for p in model.parameters() if p.requires_grad]
    results = []
    for checkpointing in (False, True):
        model.model.gradient_checkpointing = checkpointing
        torch.manual_seed(5)
        loss = model(ids, labels=ids).loss
        results.append([loss, *torch.autograd.grad(loss, trained)])
        after = torch.rand(1)
        results[-1].append(after)
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


def test_gradients_add_up_where_backward_puts_them():
    model = make_model(0.0)
    model.model.gradient_checkpointing = True
    ids = torch.randint(97, (1, 9), generator=torch.Generator().manual_seed(1))
    model(ids, labels=ids).loss.backward()
    first = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, 2 * first[name])


def test_only_the_input_is_kept():
    layer = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8))
    x = torch.randn(3, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        recomputed(layer, x, tuple(layer.parameters()))
    assert sorted(t.data_ptr() for t in kept) == sorted(t.data_ptr() for t in (x, *layer.parameters()))


def test_an_input_without_gradient_gets_none():
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    recomputed(layer, x, tuple(layer.parameters())).sum().backward()
    assert x.grad is None
    assert torch.equal(layer.weight.grad, x.sum(0).expand(4, 4))


def test_autocast_is_as_it_was():
    layer = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    results = []
    for run in (layer, lambda t: recomputed(layer, t, tuple(layer.parameters()))):
        with torch.autocast("cpu", torch.bfloat16):
            y = run(x)
        assert y.dtype == torch.bfloat16
        results.append(torch.autograd.grad(y.float().sum(), [x, *layer.parameters()]))
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


def test_no_autocast_is_as_it_was():
    """backward inside an autocast that forward did not run under"""
    layer = nn.Linear(8, 8)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    results = []
    for y in (layer(x), recomputed(layer, x, tuple(layer.parameters()))):
        loss = y.square().sum()
        with torch.autocast("cpu", torch.bfloat16):
            results.append(torch.autograd.grad(loss, [x, *layer.parameters()]))
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


def test_a_failure_leaves_the_random_generator_alone():
    calls = []

    def once(x):
        calls.append(x)
        if len(calls) > 1:
            torch.rand(3)
            raise RuntimeError("second time")
        return x * 2

    y = recomputed(once, torch.ones(2, requires_grad=True), ()).sum()
    before = torch.get_rng_state()
    torch.rand(5)
    after = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(before, after)


def test_a_second_backward_pass_through_offloaded_checkpoints_is_refused():
    layer, offload = nn.Linear(4, 4), CheckpointOffload()
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def twice(y):
        return torch.autograd.grad(y, layer.weight, retain_graph=True), torch.autograd.grad(y, layer.weight)

    first, second = twice(recomputed(layer, x, tuple(layer.parameters())).sum())
    assert torch.equal(first[0], second[0])
    with pytest.raises(RuntimeError, match=r"second backward pass .* offloaded: they are freed at the first"):
        twice(recomputed(layer, x, tuple(layer.parameters()), offload=offload).sum())
    y = recomputed(layer, x, tuple(layer.parameters()), offload=offload).sum()
    assert torch.equal(torch.autograd.grad(y, layer.weight)[0], first[0])
    assert (offload._stack, offload._pagers[0].units) == ([], 1)


@pytest.mark.parametrize("failing", ["put", "the layer before"])
def test_no_memory_for_a_buffer_loses_no_unit(failing, monkeypatch):
    layers, offload = [nn.Linear(4, 4) for _ in range(3)], CheckpointOffload()

    def run():
        x = torch.ones(2, 4, requires_grad=True)
        for layer in layers:
            x = recomputed(layer, x, tuple(layer.parameters()), offload=offload)
        return x.sum()

    def short(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    wanted = torch.autograd.grad(run(), layers[0].weight)[0]
    y = None if failing == "put" else run()
    for slot in offload._pagers[0]._slots[0 if failing == "put" else 1 :]:
        slot.buffer = slot.unit = None
    with monkeypatch.context() as patch:
        patch.setattr(Pager, "_new_buffer", short)
        with pytest.raises(torch.OutOfMemoryError):
            run() if y is None else y.backward()
    assert not any(slot.held for slot in offload._pagers[0]._slots)
    del y
    assert torch.equal(torch.autograd.grad(run(), layers[0].weight)[0], wanted)
    (pager,) = offload._pagers
    assert sorted(offload._free[pager]) == [0, 1, 2]
