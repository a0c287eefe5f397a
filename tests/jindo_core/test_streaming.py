"""Streamed layers, offloaded checkpoints and embedding: the same numbers bit for bit, from less on the device."""

from __future__ import annotations

import gc
import os
import random

import pytest
import torch
from torch import nn

from jindo_core.errors import InputError
from jindo_core.generation import generate
from jindo_core.loader import load_model
from jindo_core.lora import attach_lora
from jindo_core.model import LlamaConfig, LlamaForCausalLM
from jindo_core.nf4 import NF4Linear
from jindo_core.pager import Pager
from jindo_core.plan import spread
from jindo_core.recompute import CheckpointOffload
from jindo_core.streaming import LayerStream
from jindo_core.tokenizer import load_tokenizer

CONFIG = LlamaConfig(
    vocab_size=97, hidden_size=128, intermediate_size=192, num_hidden_layers=5, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32,
)  # fmt: skip
CPU = torch.device("cpu")


def make_model(dropout=0.2, double_quant=True):
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    for module in list(model.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, NF4Linear.from_linear(child, double_quant=double_quant))
    attach_lora(model, r=4, alpha=8, dropout=dropout, target_modules="all-linear").train()
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    return model


def stream(model, numbers, store="host"):
    model.model.stream = LayerStream(CPU, store)
    for number in numbers:
        model.model.stream.take(number, model.model.layers[number])
    return model.model.stream


def step(model, ids):
    torch.manual_seed(5)
    loss = model(ids, labels=ids).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


@pytest.fixture
def ids():
    return torch.randint(97, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("numbers", [[2], [1, 3], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("place", ["host", "file"])
def test_streamed_layers_give_the_same_bits(numbers, place, double_quant, ids, tmp_path):
    model = make_model(double_quant=double_quant)
    wanted = step(model, ids)
    streamed = stream(model, numbers, tmp_path if place == "file" else "host")
    frozen = [module.weight for i in numbers for module in model.model.layers[i].modules() if type(module) is NF4Linear]
    assert len(frozen) == 7 * len(numbers)
    assert all(weight.is_meta for weight in frozen)
    for checkpointed in (0, 3, 5):
        model.model.checkpointed_layers = checkpointed
        for _ in range(2):
            for got, want in zip(step(model, ids), wanted, strict=True):
                assert torch.equal(got, want)
    assert streamed.layers == numbers
    assert streamed.counters.bytes_in > 0
    assert streamed.counters.bytes_out == 0


def test_each_layer_is_brought_once_upwards_and_once_downwards(ids):
    model = make_model()
    streamed = stream(model, [0, 1, 2, 3, 4])
    step(model, ids)
    # The last two are still in the two buffers when the way down begins.
    pages = streamed.counters.pages_in
    assert pages == 5 + 3
    step(model, ids)
    assert streamed.counters.pages_in == 2 * pages - 2, "nor are the first two brought again"


def test_evaluation_and_restoring(ids):
    model = make_model()
    model.eval()
    with torch.no_grad():
        wanted = model(ids).logits
        streamed = stream(model, [1, 2])
        assert torch.equal(model(ids).logits, wanted)
        streamed.restore()
        assert streamed.layers == []
        model.model.stream = None
        assert torch.equal(model(ids).logits, wanted)


def test_restoring_gives_everything_back_and_taking_again_works(ids, tmp_path):
    model = make_model()
    wanted = step(model, ids)
    gc.collect()  # what tests before this one left may hold files
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        streamed = stream(model, [1, 2], tmp_path)
        step(model, ids)
        store = streamed._pager.store
        streamed.restore()
        gc.collect()
        assert (streamed.layers, streamed.nbytes, len(store), store._file) == ([], 0, 0, -1)
        assert len(os.listdir("/proc/self/fd")) == files
        streamed.take(3, model.model.layers[3])
        for got, want in zip(step(model, ids), wanted, strict=True):
            assert torch.equal(got, want)
        assert streamed._pager.units == 1
        streamed.restore()


def test_restoring_without_memory_keeps_what_did_not_come(ids, monkeypatch):
    model, real, calls = make_model(), torch.Tensor.clone, []
    wanted = step(model, ids)
    streamed = stream(model, [0, 2, 4])

    def short(tensor, **more):
        calls.append(tensor)
        if len(calls) > 28:  # four tensors of each of seven linears
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(tensor, **more)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", short)
        with pytest.raises(torch.OutOfMemoryError):
            streamed.restore()
    assert streamed.layers == [2, 4]
    streamed.take(3, model.model.layers[3])
    assert streamed._pager.units == 3, "the first layer's place"
    for got, want in zip(step(model, ids), wanted, strict=True):
        assert torch.equal(got, want)


def test_what_can_t_be_taken_stays_as_it_was(ids):
    model = make_model()
    wanted = step(model, ids)
    streamed = stream(model, [1])
    for number, layer, message in [
        (1, model.model.layers[2], "layer 1 is streamed already"),
        (2, model.model.layers[1], "layer 2 has its weights elsewhere"),
        (2, nn.Linear(2, 2), "layer 2 has no NF4 weights"),
    ]:
        with pytest.raises(ValueError, match=message):
            streamed.take(number, layer)
    assert (streamed.layers, streamed._pager.units) == ([1], 1)
    for got, want in zip(step(model, ids), wanted, strict=True):
        assert torch.equal(got, want)


def test_a_streamed_layer_outside_its_turn_is_no_silent_zero(ids):
    model = make_model()
    stream(model, [1])
    with pytest.raises(ValueError, match="x on cpu and W on meta: expected one device"):
        model.model.layers[1].mlp.gate_proj.base(torch.zeros(1, 128))


def test_gradients_without_train_mode(ids):
    model = make_model(dropout=0.0)
    model.eval()
    wanted = step(model, ids)
    stream(model, [0, 4])
    for got, want in zip(step(model, ids), wanted, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("place", ["host", "file"])
@pytest.mark.parametrize("checkpointed", [2, 5])
def test_offloaded_checkpoints_give_the_same_bits(checkpointed, place, ids, tmp_path):
    model = make_model()
    wanted = step(model, ids)
    short = step(model, ids[:1, :9])
    model.model.checkpointed_layers = checkpointed
    offload = model.model.checkpoint_offload = CheckpointOffload(tmp_path if place == "file" else "host")
    for given, expected in [(ids[:1, :9], short), (ids, wanted), (ids[:1, :9], short), (ids, wanted)]:
        for got, want in zip(step(model, given), expected, strict=True):
            assert torch.equal(got, want)
    assert len(offload._pagers) == 1, "the one for the smaller batch is gone"
    assert offload._pagers[0].units == checkpointed
    assert offload._stack == []


def test_several_graphs_at_once_and_dropped_ones(ids):
    model = make_model(dropout=0.0)
    model.model.gradient_checkpointing = True
    wanted = [step(model, part) for part in (ids, ids.flip(0))]
    offload = model.model.checkpoint_offload = CheckpointOffload()
    trained = [p for p in model.parameters() if p.requires_grad]
    losses = [model(part, labels=part).loss for part in (ids, ids.flip(0), ids)]
    del losses[2]
    assert len(offload._stack) == 10
    for loss, want in zip(losses, wanted, strict=True):
        for got, expected in zip(torch.autograd.grad(loss, trained), want[1:], strict=True):
            assert torch.equal(got, expected)
    assert offload._stack == []


def test_streaming_and_offloading_together(ids):
    model = make_model()
    wanted = step(model, ids)
    stream(model, spread(3, 5))
    model.model.checkpoint_offload = CheckpointOffload()
    model.model.gradient_checkpointing = True
    for got, want in zip(step(model, ids), wanted, strict=True):
        assert torch.equal(got, want)


class RunsOut:
    """Calls through it run out of memory at the one that `at` names, counted on from now."""

    def __init__(self):
        self.calls, self.at, self.raised = 0, -1, 0

    def around(self, real):
        def call(*given, **more):
            self.calls += 1
            if self.calls == self.at:
                self.raised += 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(*given, **more)

        return call


@pytest.mark.parametrize("site", ["mlp", "attention", "_new_buffer", "extend"])
def test_a_step_that_runs_out_anywhere_can_be_tried_again(site, ids, monkeypatch):
    """Nothing stays held, no unit is lost, and the step without faults gives the same bits."""
    order, runs_out = random.Random(site), RunsOut()
    wanted = step(make_model(), ids)
    if site in ("_new_buffer", "extend"):
        monkeypatch.setattr(Pager, site, runs_out.around(getattr(Pager, site)))
    for _ in range(8):
        runs_out.at = -1
        model = make_model()
        streamed = stream(model, order.choice([[0, 1, 2, 3, 4], [1, 3], [2]]))
        model.model.checkpointed_layers = order.choice([3, 5])
        offload = model.model.checkpoint_offload = CheckpointOffload()
        for layer in model.model.layers if site in ("mlp", "attention") else ():
            part = layer.mlp if site == "mlp" else layer.self_attn
            part.forward = runs_out.around(part.forward)
        for _ in range(2):
            before = runs_out.calls
            runs_out.at = before + order.randrange(1, 6 if site == "extend" else 5 if site == "_new_buffer" else 11)
            try:
                step(model, ids)
            except torch.OutOfMemoryError:
                assert runs_out.calls == runs_out.at
            runs_out.at = -1
            for got, want in zip(step(model, ids), wanted, strict=True):
                assert torch.equal(got, want)
            assert offload._stack == []
            assert [sorted(free) for free in offload._free.values()] == [list(range(p.units)) for p in offload._pagers]
            assert not any(slot.held for p in (streamed._pager, *offload._pagers) for slot in p._slots)
    assert runs_out.raised >= 6


def test_streamed_layers_are_spread():
    assert [spread(count, 8) for count in (0, 1, 4)] == [[], [4], [1, 3, 5, 7]]
    assert spread(3, 3) == [0, 1, 2]


@pytest.mark.parametrize("offload", [1, 3])
def test_loading_with_layers_on_the_host(stories260k, offload):
    whole = load_model(stories260k, dtype="fp32", device="cpu")
    model = load_model(stories260k, dtype="fp32", device="cpu", offload_layers=offload, offload_embedding=True)
    assert model.model.stream.layers == spread(offload, model.config.num_hidden_layers)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
    tokenizer = load_tokenizer(stories260k)
    texts = ["".join(generate(m, tokenizer, "Once", max_new_tokens=12)) for m in (whole, model)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offload_layers": 99}, "offload_layers is 99, expected 0 to 5"),
        ({"offload_layers": -1}, "offload_layers is -1"),
        ({"offload_layers": 1, "quantize": None}, "only NF4 layers are streamed"),
        ({"offload_layers": 1, "offload_folder": "/nowhere/at/all"}, "can't be written to"),
    ],
)
def test_what_can_t_be_streamed_is_refused(stories260k, settings, message):
    with pytest.raises(InputError, match=message):
        load_model(stories260k, device="cpu", **settings)
