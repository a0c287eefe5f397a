"""The fused LoRA kernels in Triton's interpreter: values and gradients against the reference run in fp64.

No bf16: the interpreter's dot of it is wrong. fp16 runs the same code path of the kernels.
"""

from __future__ import annotations

import pytest
import torch

from jindo_core.kernels import dispatch, lora_matmul_triton, nf4
from jindo_core.kernels import dropout as dropout_contract
from jindo_core.kernels import lora_matmul as contract
from jindo_core.kernels import lora_matmul_reference as reference

pytestmark = pytest.mark.interpreter

SEED = torch.tensor([-987654321], dtype=torch.int32)
# M, K, N, r, block size. Aligned and not: K odd, K and N no multiples of a tile, ranks that are no powers of
# two and above a tile's 64, blocks that cross rows, M beyond a tile.
CASES = [
    (1, 576, 192, 8, 64),
    (5, 64, 70, 1, 64),
    (17, 192, 33, 20, 128),
    (65, 128, 65, 16, 64),
    (3, 320, 48, 70, 64),
    (2, 100, 33, 3, 64),
    (18, 33, 7, 5, 64),
    (4, 96, 40, 4, 32),
]


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory(nan_in_fresh_memory):
    """Nothing may be left unwritten."""


def make_case(m, k, n, r, block_size, dtype, double_quant=True):
    generator = torch.Generator().manual_seed(m * k + n)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    packed, absmax = nf4.nf4_quantize(normal(n, k) / k**0.5, block_size)
    parts = (packed, *(nf4.nf4_quantize_absmax(absmax) if double_quant else (absmax, None, None)))
    x = normal(m, k).to(dtype)
    return x, parts, normal(r, k) / k**0.5, normal(n, r) / max(r, 1) ** 0.5, normal(m, n).to(dtype)


def widen(parts, n, k, block_size, dtype):
    """The dequantized weight as the kernels see it, rounded to `dtype`, in fp64."""
    return nf4.nf4_dequantize(*parts, (n, k), dtype=dtype, block_size=block_size).double()


def forward(x, *rest, run=lora_matmul_triton.forward):
    """One layer through the implementation: y and D(x)A^T."""
    *parts, n, block_size, a, b, scale, dropout, seed = rest
    layer = contract.Projection(*parts, n, a, b, scale)
    return run(x, [layer], block_size, dropout, seed, False)[:2]


def backward(dy, x, *rest, run=lora_matmul_triton.backward):
    """One layer's dX, dA and dB; an empty tensor for what there is none of."""
    *parts, k, block_size, a, b, down, scale, dropout, seed, need_dx = rest
    layer = contract.Projection(*parts, dy.shape[-1], a, b, scale)
    dx, da, db = run(dy, x, [layer], k, block_size, down, None, dropout, seed, need_dx)
    return dx, *(da or [dy.new_empty(0)]), *(db or [dy.new_empty(0)])


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, dtype, dropout, close):
    m, k, n, r, block_size = case
    x, parts, a, b, dy = make_case(m, k, n, r, block_size, dtype)
    w = widen(parts, n, k, block_size, dtype)
    x64, a64, b64, dy64 = x.double(), a.to(dtype).double(), b.to(dtype).double(), dy.double()
    mask = torch.ones(m, k, dtype=torch.float64)
    if dropout:
        mask = dropout_contract.keep_mask(x.shape, dropout, SEED) / (1 - dropout)

    y, down = forward(x, *parts, n, block_size, a, b, 1.7, dropout, SEED)
    down64 = (x64 * mask) @ a64.T
    assert y.dtype == down.dtype == dtype
    close("lora_matmul", down, down64)
    close("lora_matmul", y, x64 @ w.T + 1.7 * down64 @ b64.T)

    grads = backward(
        dy, x, *parts, k, block_size, a, b, down, 1.7, dropout, SEED, True
    )  # fmt: skip
    through_b = dy64 @ b64
    expected = (
        dy64 @ w + 1.7 * mask * (through_b @ a64),
        1.7 * through_b.T @ (x64 * mask),
        1.7 * dy64.T @ down64,
    )
    for grad, wanted, like in zip(grads, expected, (x, a, b), strict=True):
        assert grad.dtype == like.dtype
        close("lora_matmul", grad, wanted, dtype)


@pytest.mark.parametrize("case", [(4, 128, 48, 8, 64), (3, 70, 9, 8, 64)])
def test_single_quantization_and_no_adapter(case, close):
    m, k, n, r, block_size = case
    x, parts, a, b, dy = make_case(m, k, n, r, block_size, torch.float32, double_quant=False)
    w = widen(parts, n, k, block_size, torch.float32)
    y, down = forward(x, *parts, n, block_size, None, None, 1.0, 0.0, None)
    assert down.shape == (m, 0)
    close("lora_matmul", y, x.double() @ w.T)
    dx, da, db = backward(dy, None, *parts, k, block_size, None, None, None, 1.0, 0.0, None, True)
    assert da.numel() == db.numel() == 0
    close("lora_matmul", dx, dy.double() @ w)
    # A frozen adapter: x was not saved, dX still goes through it.
    dx, da, db = backward(dy, None, *parts, k, block_size, a, b, None, 0.5, 0.0, None, True)
    assert da.numel() == db.numel() == 0
    close("lora_matmul", dx, dy.double() @ w + 0.5 * (dy.double() @ b.double()) @ a.double())


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_nothing_beyond_the_inputs_is_used(case, double_quant, walled):
    m, k, n, r, block_size = case
    x, parts, a, b, dy = make_case(m, k, n, r, block_size, torch.float32, double_quant)
    results = []
    for wall in (lambda t: t, walled):
        args = [t if t is None or t.dim() == 0 else wall(t) for t in parts]
        x_, a_, b_, dy_ = wall(x), wall(a), wall(b), wall(dy)
        y, down = forward(x_, *args, n, block_size, a_, b_, 1.0, 0.1, SEED)
        grads = backward(dy_, x_, *args, k, block_size, a_, b_, wall(down), 1.0, 0.1, SEED, True)
        results.append((y, down, grads[0]))
    for plain, between_walls in zip(*results, strict=True):
        assert torch.equal(plain, between_walls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 333), (2, 2048)])
def test_mask_is_bit_identical(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for dropout in (0.05, 0.5):
        ours = lora_matmul_triton.drop(x, dropout, dropout_contract.growth(dropout), SEED)
        assert torch.equal(ours, dropout_contract.drop(x, dropout, SEED))
        assert torch.equal(lora_matmul_triton.mask(x, dropout, SEED), dropout_contract.mask_reference(x, dropout, SEED))


def test_mask_of_the_matrix_kernels_is_that_of_the_contract():
    """One-hot A and B read the masks out: K = r, down = D(1), and dX's adapter part is D'(1) of row n = 0."""
    m, k = 20, 64
    packed, absmax = nf4.nf4_quantize(torch.zeros(1, k))
    parts = (packed, absmax, None, None)
    kept = dropout_contract.keep_mask(torch.Size((m, k)), 0.3, SEED)
    ones, eye = torch.ones(m, k), torch.eye(k)
    _, down = forward(ones, *parts, 1, 64, eye, torch.ones(1, k), 1.0, 0.3, SEED)
    assert torch.equal(down != 0, kept)
    dx, _, _ = backward(
        torch.ones(m, 1), ones, *parts, k, 64, eye, torch.ones(1, k), down, 1.0, 0.3, SEED, True
    )
    assert torch.equal(dx != 0, kept)
    assert torch.equal(dx, down)


def test_autograd_runs_through_the_kernels(close):
    """The operator as users call it: leading dimensions, a strided x, fp32 A and B beside an fp16 x."""
    wide, parts, a, b, _ = make_case(6, 260, 40, 4, 64, torch.float16)
    packed, absmax = nf4.nf4_quantize(torch.randn(40, 128, generator=torch.Generator().manual_seed(2)))
    parts = (packed, *nf4.nf4_quantize_absmax(absmax))
    x = wide.view(2, 3, 260)[..., 2:130].detach().requires_grad_()
    a, b = a[:, :128].clone().requires_grad_(), b.requires_grad_()
    results = []
    for name in ("triton", "reference"):
        with dispatch.override(name):
            y = contract.lora_matmul(x, *parts, 40, a, b, scale=2.0, dropout=0.1, seed=SEED)
            results.append((y, *torch.autograd.grad(y.float().square().sum(), (x, a, b))))
    for ours, wanted in zip(*results, strict=True):
        close("lora_matmul", ours, wanted, torch.float16)


def test_a_group_equals_its_layers(close):
    """Results side by side, dX summed, a layer without an adapter between two with one."""
    m, k, block_size = 5, 128, 64
    x, _, _, _, _ = make_case(m, k, 8, 2, block_size, torch.float32)
    layers = []
    for n, r in ((48, 4), (33, 0), (70, 3)):
        _, parts, a, b, _ = make_case(m, k, n, r, block_size, torch.float32)
        layers.append(contract.Projection(*parts, n, a if r else None, b if r else None, 1.5))
    dy = torch.randn(m, 151, generator=torch.Generator().manual_seed(3))
    for dropout in (0.0, 0.3):
        y, down, _ = lora_matmul_triton.forward(x, layers, block_size, dropout, SEED, False)
        wanted = reference.forward_reference(x.double(), layers, block_size, dropout, SEED, False)
        close("lora_matmul", y, wanted[0])
        close("lora_matmul", down, wanted[1])
        grads = lora_matmul_triton.backward(dy, x, layers, k, block_size, down, None, dropout, SEED, True)
        wanted = reference.backward_reference(
            dy.double(), x.double(), layers, k, block_size, wanted[1], None, dropout, SEED, True
        )
        close("lora_matmul", grads[0], wanted[0])
        for grad, want in zip((*grads[1], *grads[2]), (*wanted[1], *wanted[2]), strict=True):
            close("lora_matmul", grad, want)


def test_fp64_and_no_rows_are_left_to_the_reference():
    x, parts, a, b, dy = make_case(3, 64, 8, 2, 64, torch.float64)
    y, down = forward(x, *parts, 8, 64, a, b, 1.0, 0.0, None)
    assert torch.equal(y, forward(x, *parts, 8, 64, a, b, 1.0, 0.0, None, run=reference.forward_reference)[0])
    args = (*parts, 64, 64, a, b, down, 1.0, 0.0, None, True)
    grads = backward(dy, x, *args)
    for grad, wanted in zip(grads, backward(dy, x, *args, run=reference.backward_reference), strict=True):
        assert torch.equal(grad, wanted)
    empty, _ = forward(x[:0].float(), *parts, 8, 64, a, b, 1.0, 0.0, None)
    assert empty.shape == (0, 8)
