"""patch_model: which layers of a foreign model are swapped, what is refused, torch.compile and FSDP2 on the result."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import jindo_core as jc
from jindo_core.integrations.patch import computes_as_linear
from jindo_core.nf4 import NF4Linear, quantize_nf4


class Rewritten(nn.Linear):
    """Linear, but for the way it is written, as Falcon's."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Router(nn.Linear):
    def __init__(self):
        super().__init__(64, 8)
        self.top = 2

    def forward(self, x):
        return super().forward(x).topk(self.top)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Block(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.norm = nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, 192), Rewritten(192, 64, bias=False)
        self.lm_head = nn.Linear(64, 96, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        h = self.embed(ids)
        h = h + self.down(F.silu(self.up(self.norm(h))))
        return self.lm_head(h)


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block()


@pytest.fixture
def ids():
    return torch.arange(24).view(2, 12)


def test_layers_are_swapped_in_place(block, ids):
    weights = {name: block.get_submodule(name).weight.detach().clone() for name in ("up", "down")}
    bias = block.up.bias.detach().clone()
    assert jc.patch_model(block.train(), double_quant=False) is block
    for name, weight in weights.items():
        layer = block.get_submodule(name)
        assert type(layer) is NF4Linear
        assert layer.training
        assert torch.equal(layer.nf4.dequantize(), quantize_nf4(weight, double_quant=False).dequantize())
    assert torch.equal(block.up.bias, bias)
    assert type(block.lm_head) is nn.Linear
    h = block.embed(ids)
    y = F.linear(F.silu(F.linear(block.norm(h), block.up.nf4.dequantize(), bias)), block.down.nf4.dequantize())
    torch.testing.assert_close(block(ids), block.lm_head(h + y))


def test_targets_and_skips(block):
    jc.patch_model(block, target_modules=["up", "down"], skip=["down"])
    assert [path for path, m in block.named_modules() if isinstance(m, NF4Linear)] == ["up"]
    jc.patch_model(block, skip=())
    assert [path for path, m in block.named_modules() if isinstance(m, NF4Linear)] == ["up", "down", "lm_head"]


def test_a_name_to_skip_may_be_a_string(block):
    jc.patch_model(block, skip="lm_head")
    assert type(block.lm_head) is nn.Linear
    assert type(block.up) is NF4Linear
    with pytest.raises(jc.InputError, match="Block has no linear layer left"):
        jc.patch_model(block)


@pytest.mark.parametrize("skipped", [None, "down", "inner.again"])
def test_a_layer_in_two_places_is_one_layer(block, ids, skipped):
    """Each place, also inside a module that has two itself, and chosen by the name of either."""
    block.down2, block.inner = block.down, nn.ModuleDict({"again": block.down, "own": nn.Linear(64, 64)})
    block.twice = block.inner
    jc.patch_model(block, **({} if skipped is None else {"skip": skipped}))
    assert type(block.down) is (NF4Linear if skipped is None else Rewritten)
    assert block.down2 is block.down
    assert block.inner["again"] is block.down
    assert block.twice is block.inner
    assert type(block.inner["own"]) is NF4Linear
    assert block(ids).isfinite().all()


def test_a_tied_head_stays_tied():
    block = jc.patch_model(Block(tied=True), skip=())
    assert type(block.lm_head) is nn.Linear
    assert block.lm_head.weight is block.embed.weight


def test_dtype_is_of_what_stays(block):
    constants = quantize_nf4(block.up.weight, double_quant=False)
    jc.patch_model(block, dtype=torch.bfloat16, double_quant=False)
    assert {p.dtype for p in block.parameters()} == {torch.bfloat16, torch.uint8}
    assert torch.equal(block.up.absmax, constants.absmax)
    assert block.embed.weight.requires_grad
    assert not block.up.weight.requires_grad


def test_what_is_no_plain_linear_is_left_and_named(block):
    block.router, block.attention = Router(), nn.MultiheadAttention(64, 4)
    with pytest.warns(UserWarning, match=r"left unquantized.*Router \(router\).*NonDynamicallyQuantizableLinear"):
        jc.patch_model(block)
    assert type(block.router) is Router
    assert not isinstance(block.attention.out_proj, NF4Linear)
    assert [kind for kind in (nn.Linear, Rewritten, Router, Doubled) if computes_as_linear(kind)] == [
        nn.Linear, Rewritten,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "name", "linear"),
    [
        ("transformers.models.falcon.modeling_falcon", "FalconLinear", True),
        ("transformers.models.llama4.modeling_llama4", "Llama4Router", False),
        ("transformers.models.phimoe.modeling_phimoe", "PhimoeTopKRouter", False),
        ("transformers.models.idefics.modeling_idefics", "IdeficsDecoupledLinear", False),
        ("bitsandbytes.nn", "Linear4bit", False),
        ("bitsandbytes.nn", "Linear8bitLt", False),
        ("jindo_core.nf4", "NF4Linear", False),
    ],
)
def test_known_subclasses(module, name, linear):
    assert computes_as_linear(getattr(importlib.import_module(module), name)) == linear


def test_asking_a_subclass_draws_no_random_number():
    computes_as_linear.cache_clear()
    torch.manual_seed(3)
    computes_as_linear(Rewritten)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn)


@pytest.mark.parametrize(
    ("spoil", "given", "said"),
    [
        (lambda b: None, {"target_modules": ["upp"]}, r"'upp' matches no linear layer.*Did you mean 'up'\?"),
        (lambda b: None, {"skip": ["up", "down", "lm_head"]}, "Block has no linear layer left"),
        (lambda b: b.down.weight.data.view(-1)[5].fill_(torch.inf), {}, r"down\.weight has values that are not finite"),
        (lambda b: b.down.to("meta"), {}, r"down\.weight is on the meta device"),
        (lambda b: b.down.register_forward_hook(print), {}, "down has hooks"),
        (
            lambda b: setattr(b.down, "weight", nn.Parameter(b.down.weight.data.to(torch.float8_e4m3fn))),
            {},
            r"down\.weight is torch\.float8_e4m3fn \(64, 192\), expected",
        ),
        (lambda b: setattr(b, "none", nn.Linear(64, 0)), {}, r"none\.weight is torch\.float32 \(0, 64\)"),
        (lambda b: None, {"skip": ["lm_haed"]}, r"skip 'lm_haed' matches no linear.*Did you mean 'lm_head'\?"),
        (lambda b: None, {"skip": ["norm"]}, "skip 'norm' matches no linear layer"),
        (lambda b: None, {"skip": 5}, "skip is 5, expected a name or a list of names"),
        (lambda b: None, {"skip": ["up", None]}, "skip is .* expected a name or a list"),
        (lambda b: None, {"target_modules": None}, "target_modules is None, expected a name or a list of names"),
        (lambda b: None, {"block_size": 63}, "block_size is 63, expected one of 32, 64"),
        (lambda b: None, {"block_size": 48}, "block_size is 48, expected one of 32, 64"),
        (lambda b: None, {"double_quant": "no"}, "double_quant is 'no', expected True or False"),
        (lambda b: None, {"dtype": "bf16"}, r"dtype is 'bf16', expected torch\.bfloat16"),
        (lambda b: None, {"dtype": torch.int8}, r"dtype is torch\.int8, expected torch\.bfloat16"),
    ],
)
def test_what_is_refused_changes_nothing(block, spoil, given, said):
    spoil(block)
    with pytest.raises(jc.InputError, match=said):
        jc.patch_model(block, **given)
    assert not [m for m in block.modules() if isinstance(m, NF4Linear)]


@pytest.mark.parametrize("model", [nn.Linear(64, 64), None])
def test_what_holds_no_layers_is_refused(model):
    with pytest.raises(
        jc.InputError, match=f"got a {type(model).__name__}, expected a module that holds linear layers"
    ):
        jc.patch_model(model)


def test_a_transformers_model(saved, load, ids):
    model = jc.patch_model(load(saved("llama")))
    assert len([m for m in model.modules() if isinstance(m, NF4Linear)]) == 14
    assert model.is_loaded_in_4bit
    assert model.num_parameters() == load(saved("llama")).num_parameters()
    assert model(ids).logits.isfinite().all()


def test_memory_falls_layer_by_layer(block):
    """The full weight of a layer is gone when the next one is quantized."""
    import gc
    import weakref

    references = [weakref.ref(block.up), weakref.ref(block.down)]
    alive = []
    made = NF4Linear.from_linear

    def watch(layer, **more):
        alive.append(sum(r() is not None for r in references))
        return made(layer, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NF4Linear, "from_linear", watch)
        gc.disable()  # references alone must do it
        try:
            jc.patch_model(block)
        finally:
            gc.enable()
    assert alive == [2, 1]


@pytest.mark.parametrize("adapted", [False, True])
def test_it_compiles_as_one_graph(block, ids, adapted):
    jc.patch_model(block)
    if adapted:
        torch.manual_seed(1)
        jc.attach_lora(block, r=4, target_modules="all-linear")
        for layer in (block.up, block.down):
            nn.init.normal_(layer.lora_B, std=0.1)

    def gradients(model):
        block.zero_grad()
        y = model(ids)
        y.square().mean().backward()
        return [y.detach()] + [p.grad.clone() for p in block.parameters() if p.requires_grad]

    block.embed.weight.requires_grad_()  # the backward pass goes through every layer
    wanted = gradients(block)
    got = gradients(torch.compile(block, fullgraph=True, backend="aot_eager"))
    assert len(got) == (6 if adapted else 5)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_two_ranks_of_fsdp2_give_one_process_gradients(tmp_path):
    """fully_shard on gloo, with and without mixed precision; what must hold is asserted in the ranks themselves."""
    script = Path(__file__).with_name("two_ranks.py")
    ranks = []
    for rank in range(2):
        env = os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "STORE": str(tmp_path / "store")}
        command = [sys.executable, str(script)]
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said[0][-3000:] + said[1][-3000:]
    assert all("as one process" in text for text in said)
