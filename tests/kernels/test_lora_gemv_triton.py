"""The decoding GEMV in Triton's interpreter, against W in fp64. No bf16: the interpreter truncates to it."""

from __future__ import annotations

import pytest
import torch

from jindo_core.kernels import dispatch, nf4
from jindo_core.kernels import lora_gemv_triton as module
from jindo_core.kernels.lora_matmul import Projection, lora_matmul, lora_matmul_group

pytestmark = pytest.mark.interpreter

# M, K, N, r, block size. 64 divides K and the block size, or not; K less than a step, several steps and a part of
# one; N no multiple of a tile, and 1; ranks that are no powers of two, and none; blocks that cross rows.
CASES = [
    (1, 576, 24, 8, 64),
    (2, 1024, 13, 1, 64),
    (3, 2112, 9, 20, 128),
    (4, 192, 70, 16, 64),
    (1, 3136, 8, 0, 64),
    (4, 64, 1, 0, 64),
    (1, 100, 33, 3, 64),
    (2, 33, 7, 5, 64),
    (3, 300, 12, 0, 32),
    (4, 96, 10, 4, 32),
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
    adapter = (normal(r, k) / k**0.5, normal(n, r) / r**0.5) if r else (None, None)
    return normal(m, k).to(dtype), parts, *adapter


def oracle(x, parts, a, b, scale, block_size, n):
    """y and x A^T in fp64."""
    x = x.double()
    w = nf4.nf4_dequantize(*parts, (n, x.shape[1]), dtype=torch.float32, block_size=block_size).double()
    if a is None:
        return x @ w.T, None
    down = x @ a.double().T
    return x @ w.T + scale * down @ b.double().T, down


def check(case, dtype, close, *, double_quant=True, wall=lambda t: t, out=None):
    m, _, n, r, block_size = case
    x, parts, a, b = make_case(*case, dtype, double_quant)
    y, down = oracle(x, parts, a, b, 1.7, block_size, n)
    out = torch.empty(m, n, dtype=dtype) if out is None else out
    walls = [t if t is None or t.dim() == 0 else wall(t) for t in (x, *parts, a, b)]
    x, parts, a, b = walls[0], walls[1:5], *walls[5:]
    ours = module.gemv(x, *parts, block_size, a, b, 1.7, out)
    assert ours.shape == (m, r)
    assert ours.dtype == dtype
    close("lora_gemv", out, y)
    if r:
        close("lora_gemv", ours, down)
    return out


@pytest.mark.parametrize("programs", [1, 2048])  # one part of K, and as many as there are steps
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values(case, dtype, programs, close, monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", programs)
    check(case, dtype, close)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_nothing_beyond_the_inputs_is_used(case, double_quant, close, walled):
    plain = check(case, torch.float32, close, double_quant=double_quant)
    assert torch.equal(plain, check(case, torch.float32, close, double_quant=double_quant, wall=walled))


@pytest.mark.parametrize("programs", [1, 2048])
@pytest.mark.parametrize("case", [(3, 1088, 20, 8, 64), (2, 1088, 20, 0, 64), (2, 50, 20, 4, 64)])
def test_some_columns_of_a_wider_tensor(case, programs, close, monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", programs)
    wide = torch.full((case[0], 50), 7.0)
    check(case, torch.float32, close, out=wide[:, 10:30])
    assert torch.all(wide[:, :10] == 7)
    assert torch.all(wide[:, 30:] == 7)


def test_adapter_weights_in_16_bits(close):
    x, parts, a, b = make_case(2, 128, 10, 4, 64, torch.float16)
    a, b = a.to(torch.float16), b.to(torch.bfloat16)
    out = torch.empty(2, 10, dtype=torch.float16)
    module.gemv(x, *parts, 64, a, b, 0.5, out)
    close("lora_gemv", out, oracle(x, parts, a, b, 0.5, 64, 10)[0])


@pytest.mark.parametrize("n", [256, 1024, 4096, 11008, 14336])
@pytest.mark.parametrize("k", [64, 576, 4096, 14336])
def test_the_parts_of_k_cover_it_once(k, n):
    for tile in (*module.PAIRED_TILES.values(), module.UNPAIRED_TILES):
        splits, each = module.splits_of(n, k, tile)
        assert each % tile.k == 0
        assert (splits - 1) * each < k <= splits * each
        assert splits == 1 or splits * -(-n // tile.n) <= 2 * module.PROGRAMS


def test_group_through_the_operator():
    """q, k and v in one call, one of them without an adapter: values, and the gradients that the rest of the
    operator makes of what this kernel leaves for it."""
    m, k, block_size = 2, 192, 64
    parts = [make_case(m, k, n, r, block_size, torch.float32) for n, r in ((24, 4), (9, 0), (16, 8))]
    x = parts[0][0]
    layers = [
        Projection(*codes, n, *(None if t is None else t.clone().requires_grad_() for t in (a, b)), 1.7)
        for (_, codes, a, b), n in zip(parts, (24, 9, 16), strict=True)
    ]
    leaves = [x.clone().requires_grad_(), *(t for layer in layers for t in layer[5:7] if t is not None)]
    results = []
    for name in ("gemv", "reference"):
        with dispatch.override(name):
            y = lora_matmul_group(leaves[0], layers, block_size=block_size)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "dtype", "options"),
    [(5, torch.float32, {}), (0, torch.float32, {}), (1, torch.float64, {}), (2, torch.float32, {"dropout": 0.5})],
)
def test_what_is_not_decoding_takes_the_reference(rows, dtype, options):
    x, parts, a, b = make_case(max(rows, 1), 64, 8, 4, 64, dtype)
    x = x[:rows]
    options = options | {"seed": torch.tensor([3], dtype=torch.int32)}
    results = []
    for name in ("gemv", "reference"):
        with dispatch.override(name):
            results.append(lora_matmul(x, *parts, 8, a, b, scale=2.0, **options))
    assert results[0].shape == (rows, 8)
    assert torch.equal(*results)
