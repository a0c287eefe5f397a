"""The RMSNorm kernels in Triton's interpreter. No bf16: the interpreter truncates where a GPU rounds."""

from __future__ import annotations

import pytest
import torch

from jindo_core.kernels import dispatch, rms_norm_triton
from jindo_core.kernels.rms_norm import forward_reference, rms_norm

pytestmark = pytest.mark.interpreter

EPS = 1e-5
# Rows shorter and longer than a tile, and no powers of two; 30 rows of 64 are more than the programs of dW below.
SHAPES = [(5, 7), (30, 64), (3, 576), (2, 2049), (7, 200)]
LONG = [(3, 300), (5, 128), (2, 129), (4, 1000)]


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory(nan_in_fresh_memory):
    """Nothing may be left unwritten."""


@pytest.fixture
def small(monkeypatch):
    """Tiles of 128 columns and 3 partial sums: every path in little time."""
    monkeypatch.setattr(rms_norm_triton, "LONGEST_TILE", 128)
    monkeypatch.setattr(rms_norm_triton, "ELEMENTS", 256)
    monkeypatch.setattr(rms_norm_triton, "PARTIAL_SUMS", 3)


def make_case(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    x, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return x, (1 + 0.3 * torch.randn(shape[-1], generator=generator)).to(dtype), dy


def check(shape, dtype, close, oracles, wall=lambda t: t):
    x, weight, dy = make_case(shape, dtype)
    y, rstd = rms_norm_triton.forward(wall(x), wall(weight), EPS)
    dx, dweight = rms_norm_triton.backward(wall(dy), wall(x), wall(weight), wall(rstd), True)
    for ours, wanted in zip((y, dx, dweight), oracles.rms_norm(x, weight, EPS, dy), strict=True):
        assert ours.dtype == dtype
        close("rms_norm", ours, wanted)
    close("rms_norm", rstd, forward_reference(x.double(), weight.double(), EPS)[1])
    alone, none = rms_norm_triton.backward(wall(dy), wall(x), wall(weight), wall(rstd), False)
    assert none.numel() == 0
    assert torch.equal(alone, dx)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_and_gradients(shape, dtype, close, oracles):
    check(shape, dtype, close, oracles)


@pytest.mark.parametrize("shape", SHAPES + LONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.usefixtures("small")
def test_rows_longer_than_a_tile_and_programs_of_several_rows(shape, dtype, close, oracles):
    check(shape, dtype, close, oracles)


@pytest.mark.parametrize("shape", [(5, 7), (3, 300), (30, 64)])
@pytest.mark.usefixtures("small")
def test_nothing_beyond_the_inputs_is_used(shape, close, oracles, walled):
    check(shape, torch.float32, close, oracles, walled)


def test_every_width_up_to_16384_has_a_tile():
    for width in (1, 64, 100, 576, 4096, 5120, 8192, 14336, 16384, 100_000):
        tile = rms_norm_triton.tile_for(width)
        assert tile.rows * tile.columns >= 2048
        assert tile.rows * tile.columns <= 16 * 32 * tile.warps
        assert tile.columns >= width or tile.columns == 8192


def test_the_operator_runs_them(close, oracles):
    x, weight, dy = make_case((2, 3, 66), torch.float16)
    x, weight, dy = x[..., 1:-1].requires_grad_(), weight[1:-1].requires_grad_(), dy[..., 1:-1]
    with dispatch.override("triton"):
        y = rms_norm(x, weight, EPS)
        ours = (y, *torch.autograd.grad(y, (x, weight), dy))
    for value, wanted in zip(ours, oracles.rms_norm(x, weight, EPS, dy), strict=True):
        close("rms_norm", value, wanted)


def test_fp64_and_no_rows_are_left_to_the_reference():
    x, weight, dy = make_case((2, 8), torch.float64)
    y, rstd = rms_norm_triton.forward(x, weight, EPS)
    assert torch.equal(y, forward_reference(x, weight, EPS)[0])
    assert rms_norm_triton.backward(dy, x, weight, rstd, True)[0].dtype == torch.float64
    empty, _ = rms_norm_triton.forward(x[:0].float(), weight.float(), EPS)
    assert empty.shape == (0, 8)
