"""The LoRA linear's contract and reference: against fp64 oracles written out here, and as a torch operator."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from jindo_core.kernels import lora_matmul as module
from jindo_core.kernels import nf4
from jindo_core.kernels.dropout import drop, keep_mask, mask, mask_reference
from jindo_core.kernels.lora_matmul import lora_matmul

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# (leading shape, K, N, r): odd everything, K no multiple of the quantization block, and SmolLM2's q_proj.
SHAPES = [((5,), 64, 32, 8), ((2, 3), 100, 33, 3), ((1,), 33, 7, 1), ((2, 4), 576, 192, 16)]
SEED = torch.tensor([-123456789], dtype=torch.int32)


def make_case(lead, k, n, r, dtype, *, double_quant=True, adapter=True):
    """x, the quantized weight's parts, A and B; x, A and B require gradients."""
    generator = torch.Generator().manual_seed(k + n)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    packed, absmax = nf4.nf4_quantize(normal(n, k) / k**0.5)
    parts = (packed, *(nf4.nf4_quantize_absmax(absmax) if double_quant else (absmax, None, None)))
    x = normal(*lead, k).to(dtype).requires_grad_()
    if not adapter:
        return x, parts, None, None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    a = (normal(r, k) / k**0.5).to(wide).requires_grad_()
    b = (normal(n, r) / r**0.5).to(wide).requires_grad_()
    return x, parts, a, b


def oracle(x, parts, n, a, b, scale, dropout=0.0, seed=None):
    """The equations of the contract in fp64, by autograd, on the same rounded inputs."""
    dtype = x.dtype
    weight = nf4.nf4_dequantize(*parts, (n, x.shape[-1]), dtype=dtype).double()
    leaves = [t.detach().double().requires_grad_() for t in (x, a.to(dtype), b.to(dtype))]
    x64, a64, b64 = leaves
    kept = torch.ones(x.shape, dtype=torch.float64)
    if dropout:
        kept = keep_mask(x.shape, dropout, seed).double() / (1 - dropout)
    y = x64 @ weight.T + scale * ((x64 * kept) @ a64.T) @ b64.T
    return y, leaves


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lead", "k", "n", "r"), SHAPES)
def test_values_and_gradients(lead, k, n, r, dtype, dropout, close):
    x, parts, a, b = make_case(lead, k, n, r, dtype)
    y = lora_matmul(x, *parts, n, a, b, scale=2.0, dropout=dropout, seed=SEED)
    expected, leaves = oracle(x, parts, n, a, b, 2.0, dropout, SEED)
    assert y.dtype == dtype
    close("lora_matmul", y, expected)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)
    grads = torch.autograd.grad(y, (x, a, b), dy)
    for grad, wanted, leaf in zip(grads, torch.autograd.grad(expected, leaves, dy.double()), (x, a, b), strict=True):
        assert grad.dtype == leaf.dtype
        close("lora_matmul", grad, wanted, dtype)


@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("double_quant", [False, True])
def test_without_an_adapter_it_is_the_frozen_linear(double_quant, block_size, close):
    generator = torch.Generator().manual_seed(0)
    packed, absmax = nf4.nf4_quantize(torch.randn(24, 96, generator=generator), block_size)
    parts = (packed, *(nf4.nf4_quantize_absmax(absmax) if double_quant else (absmax, None, None)))
    x = torch.randn(7, 96, generator=generator, requires_grad=True)
    weight = nf4.nf4_dequantize(*parts, (24, 96), dtype=torch.float32, block_size=block_size)
    y = lora_matmul(x, *parts, 24, block_size=block_size)
    close("lora_matmul", y, x.double() @ weight.double().T)
    (dx,) = torch.autograd.grad(y.sum(), x)
    close("lora_matmul", dx, torch.ones(7, 24).double() @ weight.double())


def test_gradcheck():
    x, parts, a, b = make_case((3,), 70, 5, 2, torch.float64)

    def run(x, a, b):
        return lora_matmul(x, *parts, 5, a, b, scale=1.5, dropout=0.25, seed=SEED)

    assert torch.autograd.gradcheck(run, (x, a, b))


@pytest.mark.parametrize("trains", ["x", "a", "ab", "b"])
def test_gradients_only_where_asked_for(trains):
    x, parts, a, b = make_case((3,), 64, 8, 2, torch.float32)
    wanted = {"x": x, "a": a, "b": b}
    full = torch.autograd.grad(lora_matmul(x, *parts, 8, a, b).sum(), (x, a, b))
    for name, tensor in wanted.items():
        tensor.requires_grad_(name in trains)
    some = torch.autograd.grad(lora_matmul(x, *parts, 8, a, b).sum(), [wanted[name] for name in trains])
    for name, grad in zip(trains, some, strict=True):
        assert torch.equal(grad, full["xab".index(name)])


@pytest.mark.parametrize("adapter", [True, False])
def test_no_weight_is_saved_for_backward(adapter):
    """Beside the operator's own inputs, only `down` [M, r] is kept; x itself only if the adapter trains."""
    m, k, n, r = 4, 128, 96, 8
    x, parts, a, b = make_case((m,), k, n, r, torch.float32, adapter=adapter)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lora_matmul(x, *parts, n, a, b, dropout=0.1, seed=SEED)
    inputs = [t for t in (*parts, a, b, SEED) if t is not None] + ([x] if adapter else [])
    known = {t.untyped_storage().data_ptr() for t in inputs}
    fresh = [t for t in saved if t.untyped_storage().data_ptr() not in known]
    assert [tuple(t.shape) for t in fresh] == ([(m, r)] if adapter else [])
    dense = n * k * x.element_size()
    assert sum(t.nbytes for t in saved) < dense, "as many bytes saved as W has"
    assert y.grad_fn is not None


def test_mask_is_that_of_the_seed():
    shape = torch.Size((300, 1000))
    mask = keep_mask(shape, 0.1, SEED)
    assert torch.equal(mask, keep_mask(shape, 0.1, SEED.clone()))
    assert not torch.equal(mask, keep_mask(shape, 0.1, SEED + 1))
    # 3e5 draws: the standard error is 5.5e-4.
    assert mask.float().mean().item() == pytest.approx(0.9, abs=2.5e-3)
    columns = mask.float().mean(0)
    assert columns.min() > 0.8
    assert columns.max() < 1.0 + 1e-9
    neighbours = (mask[:, 1:] == mask[:, :-1]).float().mean().item()
    assert neighbours == pytest.approx(0.9**2 + 0.1**2, abs=4e-3)


def test_mask_is_the_hash_of_the_contract():
    """MurmurHash3's finalizer, less its last shift, in Python integers."""
    mask = keep_mask(torch.Size((4, 57)), 0.4, SEED).view(-1)
    for i in range(mask.numel()):
        h = (i * 0x9E3779B1 + int(SEED)) % 2**32
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        signed = h - 2**32 if h >= 2**31 else h
        assert bool(mask[i]) == (signed >= int(0.4 * 2**32) - 2**31)


def test_drop_scales_what_it_keeps():
    x = torch.ones(50, 20)
    dropped = drop(x, 0.2, SEED)
    assert set(dropped.unique().tolist()) == {0.0, 1.25}
    assert drop(x, 0.0, SEED) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_opcheck(dtype, adapter, keep):
    x, parts, a, b = make_case((2, 3), 70, 9, 4, dtype, adapter=adapter)
    weight = ([parts[0]], [parts[1]], [parts[2]], [parts[3]], [9])
    lists = ([a], [b]) if adapter else ([], [])
    dropout, seed = (0.1, SEED) if adapter else (0.0, None)
    opcheck(torch.ops.jindo.lora_matmul, (x, *weight, 64, *lists, [2.0], dropout, seed, keep))
    x = x.detach()
    lists = tuple([t.detach() for t in group] for group in lists)
    _, down, kept = torch.ops.jindo.lora_matmul(x, *weight, 64, *lists, [2.0], dropout, seed, keep)
    dy = torch.randn(2, 3, 9).to(dtype)
    saved = (x, down) if adapter else (None, None)
    for need_dx in (True, False):
        opcheck(
            torch.ops.jindo.lora_matmul_backward,
            (dy, saved[0], *weight, 70, 64, *lists, [2.0], saved[1], kept if keep else None, dropout, seed, need_dx),
        )


def make_group(k, shapes, dtype=torch.float32):
    """Layers of (N, r); r = 0: without an adapter."""
    layers = []
    for n, r in shapes:
        _, parts, a, b = make_case((1,), k, n, max(r, 1), dtype)
        layers.append(module.Projection(*parts, n, a if r else None, b if r else None, 1.5 + r))
    return layers


@pytest.mark.parametrize("keep_weight", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shapes", [[(24, 4), (9, 0), (40, 2)], [(16, 0), (16, 0)], [(33, 1)]], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8, 9])
def test_a_group_is_its_layers_side_by_side(rows, shapes, dropout, keep_weight, each_cpu_implementation, close):
    layers = make_group(192, shapes)
    x = torch.randn(2, rows, 192, generator=torch.Generator().manual_seed(1), requires_grad=True)
    leaves = [x] + [t for layer in layers for t in (layer.lora_A, layer.lora_B) if t is not None]
    y = module.lora_matmul_group(x, layers, dropout=dropout, seed=SEED, keep_weight=keep_weight)
    wide = x.detach().double().requires_grad_()
    apart = [
        lora_matmul(wide, *layer[:4], layer.out_features, layer.lora_A, layer.lora_B, scale=layer.scale,
                    dropout=dropout, seed=SEED)
        for layer in layers
    ]  # fmt: skip
    expected = torch.cat(apart, dim=-1)
    close("lora_matmul", y, expected)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    wanted = torch.autograd.grad(expected, [wide, *leaves[1:]], dy.double())
    for grad, want in zip(torch.autograd.grad(y, leaves, dy), wanted, strict=True):
        close("lora_matmul", grad, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("rows", "k", "n", "r"), [(1, 64, 5, 2), (2, 576, 192, 8), (4, 320, 37, 0), (7, 128, 64, 3)])
def test_gemv_of_few_rows(rows, k, n, r, double_quant, dtype, each_cpu_implementation, close):
    """No rounding of W to x's dtype is needed, so the oracle's W is the exact one."""
    x, parts, a, b = make_case((rows,), k, n, max(r, 1), dtype, double_quant=double_quant)
    a, b = (a, b) if r else (None, None)
    y = lora_matmul(x, *parts, n, a, b, scale=0.7)
    weight = nf4.nf4_dequantize(*parts, (n, k), dtype=torch.float64)
    expected = x.double() @ weight.T
    if r:
        expected = expected + 0.7 * (x.double() @ a.double().T) @ b.double().T
    close("lora_matmul", y, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (17,), (3, 333), (2, 20000)])
def test_mask_of_every_implementation_is_the_same(shape, dtype, each_cpu_implementation):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(mask(x, 0.3, SEED), mask_reference(x, 0.3, SEED))


def test_keeping_the_weight_saves_it_and_spares_the_second_dequantize(monkeypatch):
    (layer,) = make_group(128, [(96, 4)])
    x = torch.randn(16, 128, requires_grad=True)
    calls = []
    dequantize = module.Projection.dequantize_into
    monkeypatch.setattr(module.Projection, "dequantize_into", lambda *args: calls.append(1) or dequantize(*args))
    plain = torch.autograd.grad(module.lora_matmul_group(x, [layer]).sum(), x)
    assert len(calls) == 2
    kept = torch.autograd.grad(module.lora_matmul_group(x, [layer], keep_weight=True).sum(), x)
    assert len(calls) == 3
    assert torch.equal(plain[0], kept[0])
    with torch.no_grad():
        assert module.lora_matmul_group(x, [layer], keep_weight=True).shape == (16, 96)


def test_a_group_of_mixed_quantization_is_refused():
    double = make_group(64, [(8, 0)])[0]
    packed, absmax = nf4.nf4_quantize(torch.ones(8, 64))
    with pytest.raises(ValueError, match="with and without double quantization"):
        module.lora_matmul_group(torch.zeros(2, 64), [double, module.Projection(packed, absmax, None, None, 8)])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph_and_trains(backend):
    x, parts, a, b = make_case((3,), 64, 32, 4, torch.float32)

    def loss(x, a, b):
        return lora_matmul(torch.tanh(x), *parts, 32, a, b, dropout=0.2, seed=SEED).square().sum()

    expected = torch.autograd.grad(loss(x, a, b), (x, a, b))
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    for grad, wanted in zip(torch.autograd.grad(compiled(x, a, b), (x, a, b)), expected, strict=True):
        torch.testing.assert_close(grad, wanted)


def test_workspace_and_scratch():
    """tests/test_simulation.py holds them to what is allocated."""
    assert module.scratch_bytes(64, [32, 16], torch.bfloat16) == 2 * 64 * 32
    plain, dropped = (
        module.workspace_bytes(1000, 64, [32], [4], torch.bfloat16, p, backward=False) for p in (0.0, 0.1)
    )
    assert dropped - plain == 2 * 1000 * 64
    assert module.workspace_bytes(1000, 64, [32], [0], torch.bfloat16, 0.1, backward=False) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_B": None}, "expected both or neither"),
        ({"lora_A": torch.zeros(4, 63)}, r"A \(4, 63\)"),
        ({"lora_B": torch.zeros(16, 5)}, r"B \(16, 5\)"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"dropout": -0.1}, "dropout -0.1"),
        ({"dropout": 0.1, "seed": None}, "without a seed"),
        ({"x": torch.zeros(3, 63)}, "expected uint8 with 504"),
        ({"out_features": 17}, "expected uint8 with 544"),
    ],
)
def test_refuses(change, message):
    packed, absmax = nf4.nf4_quantize(torch.ones(16, 64))
    good = {
        "x": torch.zeros(3, 64), "packed": packed, "absmax": absmax, "nested_absmax": None, "offset": None,
        "out_features": 16, "lora_A": torch.zeros(4, 64), "lora_B": torch.zeros(16, 4), "seed": SEED,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        lora_matmul(**(good | change))


@pytest.mark.parametrize("rows", [2, 40])
def test_autocast_changes_nothing_inside(rows):
    """x decides the products' dtype; the modules cast it."""
    x, parts, a, b = make_case((rows,), 64, 32, 4, torch.float32)
    results = []
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            y = lora_matmul(x, *parts, 32, a, b, scale=2.0)
            results.append([y, *torch.autograd.grad(y.square().sum(), (x, a, b))])
    for plain, autocast in zip(*results, strict=True):
        assert torch.equal(plain, autocast)


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("adapter", [False, True])
def test_the_result_may_be_changed_in_place(rows, adapter):
    """As Falcon's layers do with attention's output; autograd forbids it for a view that a Function returns."""
    x, parts, a, b = make_case((1, rows), 64, 32, 4, torch.float32, adapter=adapter)
    y = lora_matmul(x, *parts, 32, a, b, scale=2.0)
    wanted = y.detach() + 1
    y += 1
    assert torch.equal(y, wanted)
    (got,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(lora_matmul(x, *parts, 32, a, b, scale=2.0).sum(), x)
    assert torch.equal(got, expected)
