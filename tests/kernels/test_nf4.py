"""The NF4 contract: bit-exact with bitsandbytes both ways, and right against an fp64 search."""

from __future__ import annotations

import json

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file
from torch.library import opcheck

from jindo_core.kernels import nf4

pytestmark = pytest.mark.usefixtures("each_cpu_implementation")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BOUNDARY = 256 * 64
# Flat and not, odd and even, one block and less, and both sides of the 256-block boundary.
SHAPES = [
    (64, 64), (576, 192), (33, 7), (3, 5, 7), (64,), (63,), (65,), (2,), (129, 1),
    (BOUNDARY,), (BOUNDARY - 1,), (BOUNDARY + 1,), (BOUNDARY - 64,), (BOUNDARY + 64,), (257, 191),
]  # fmt: skip


def bnb_dequantize(packed, state):
    """bitsandbytes turns a flat weight into [1, N] or [N, 1]: the values are the same."""
    return bnb.dequantize_4bit(packed, state).reshape(state.shape)


def bnb_parts(state):
    nested = state.state2.absmax if state.nested else None
    return state.absmax, nested, state.offset if state.nested else None


def bnb_state(absmax, nested_absmax, offset, shape, dtype, block_size=64):
    second = None
    if nested_absmax is not None:
        code = bnb.create_dynamic_map()
        second = bnb.QuantState(absmax=nested_absmax, code=code, blocksize=256, dtype=torch.float32)
    return bnb.QuantState(
        absmax=absmax, shape=torch.Size(shape), code=bnb.get_4bit_type("nf4", device="cpu"), blocksize=block_size,
        quant_type="nf4", dtype=dtype, offset=offset, state2=second,
    )  # fmt: skip


def test_tables_are_those_of_bitsandbytes():
    cpu = torch.device("cpu")
    assert torch.equal(nf4.code_table(cpu), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(nf4.dynamic_map(cpu), bnb.create_dynamic_map())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_and_dequantize_equal_bitsandbytes(shape, dtype, make_weight):
    weight = make_weight(shape, dtype)
    theirs, state = bnb.quantize_4bit(weight, quant_type="nf4")
    packed, absmax = nf4.nf4_quantize(weight)
    assert packed.shape == ((weight.numel() + 1) // 2, 1)
    assert torch.equal(packed, theirs)
    assert torch.equal(absmax, state.absmax)
    ours = nf4.nf4_dequantize(packed, absmax, None, None, shape, dtype=dtype)
    assert ours.dtype == dtype
    assert torch.equal(ours, bnb_dequantize(theirs, state))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_double_quantization_equals_bitsandbytes_both_ways(shape, dtype, make_weight):
    weight = make_weight(shape, dtype)
    theirs, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    packed, absmax = nf4.nf4_quantize(weight)
    parts = nf4.nf4_quantize_absmax(absmax)
    for ours, other in zip(parts, bnb_parts(state), strict=True):
        assert torch.equal(ours, other)
    # Their parts through our dequantize, and ours through theirs.
    expected = bnb_dequantize(theirs, state)
    assert torch.equal(nf4.nf4_dequantize(theirs, *bnb_parts(state), shape, dtype=dtype), expected)
    assert torch.equal(bnb_dequantize(packed, bnb_state(*parts, shape, dtype)), expected)


@pytest.mark.parametrize("block_size", [128, 256, 4096])
def test_other_block_sizes_equal_bitsandbytes(block_size, make_weight):
    weight = make_weight((129, 77))
    theirs, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=block_size)
    packed, absmax = nf4.nf4_quantize(weight, block_size)
    assert torch.equal(packed, theirs)
    assert torch.equal(absmax, state.absmax)
    ours = nf4.nf4_dequantize(packed, absmax, None, None, weight.shape, dtype=torch.float32, block_size=block_size)
    assert torch.equal(ours, bnb_dequantize(theirs, state))


def test_fp64_goes_through_fp32(make_weight):
    weight = make_weight((40, 70), torch.float64)
    packed, absmax = nf4.nf4_quantize(weight)
    narrow = nf4.nf4_quantize(weight.float())
    assert torch.equal(packed, narrow[0])
    assert torch.equal(absmax, narrow[1])
    wide = nf4.nf4_dequantize(packed, absmax, None, None, (40, 70), dtype=torch.float64)
    assert torch.equal(wide, nf4.nf4_dequantize(packed, absmax, None, None, (40, 70), dtype=torch.float32).double())


def test_codes_are_the_nearest_ones(make_weight):
    """Against a search in fp64: no other code is closer than rounding can explain."""
    weight = make_weight((130, 33), torch.float64)
    packed, absmax = nf4.nf4_quantize(weight)
    scale = absmax.double().repeat_interleave(64)[: weight.numel(), None]
    codes = nf4.code_table(torch.device("cpu")).double()
    errors = (weight.view(-1, 1) - codes * scale).abs()
    ours = torch.stack([packed >> 4, packed & 15], -1).view(-1).long()[: weight.numel()]
    assert torch.all(errors.gather(1, ours[:, None]) <= errors.amin(1, keepdim=True) + 1e-6 * scale)
    values = nf4.nf4_dequantize(packed, absmax, None, None, weight.shape, dtype=torch.float64)
    exact = (codes[ours] * scale[:, 0]).view(weight.shape)
    assert torch.all((values - exact).abs() <= exact.abs() * 2**-24 + 2**-149)


def test_a_tie_takes_the_lower_code():
    weight = torch.zeros(64)
    weight[0] = 1.0
    weight[1:16] = nf4.thresholds(torch.device("cpu"))
    packed, _ = nf4.nf4_quantize(weight)
    codes = torch.stack([packed >> 4, packed & 15], -1).view(-1)
    assert codes[1:16].tolist() == list(range(15))
    above = torch.nextafter(weight[1:16], torch.ones(15))
    weight[1:16] = above
    packed, _ = nf4.nf4_quantize(weight)
    assert torch.stack([packed >> 4, packed & 15], -1).view(-1)[1:16].tolist() == list(range(1, 16))


def test_maxima_too_small_for_a_reciprocal():
    """fp32 only: bitsandbytes flushes subnormals to zero where it rounds them to bf16 with AVX512."""
    weight = torch.randn(200, generator=torch.Generator().manual_seed(0)) * 1e-38
    weight[64:128] *= 1e-3
    weight[192:] *= 1e-3
    theirs, state = bnb.quantize_4bit(weight, quant_type="nf4")
    packed, absmax = nf4.nf4_quantize(weight)
    assert torch.equal(packed, theirs)
    assert torch.equal(absmax, state.absmax)
    ours = nf4.nf4_dequantize(packed, absmax, None, None, (200,), dtype=torch.float32)
    assert torch.equal(ours, bnb_dequantize(theirs, state))


@pytest.mark.parametrize("view", ["transposed", "strided", "sliced", "vector"])
def test_non_contiguous_input(view, make_weight):
    base = make_weight((96, 130))
    views = {"transposed": base.t(), "strided": base[::2, ::3], "sliced": base[:, 1:-1], "vector": base[:, 3]}
    weight = views[view]
    packed, absmax = nf4.nf4_quantize(weight)
    expected = nf4.nf4_quantize(weight.contiguous())
    assert torch.equal(packed, expected[0])
    assert torch.equal(absmax, expected[1])


@pytest.mark.parametrize("count", [64 * 20, 64 * 20 + 1, 64 * 3 - 1, 5])
def test_chunks_leave_no_seam(count, make_weight, monkeypatch):
    weight = make_weight((count,))
    whole = nf4.nf4_quantize(weight)
    values = nf4.nf4_dequantize(*whole, None, None, (count,), dtype=torch.bfloat16)
    monkeypatch.setattr(nf4, "_CHUNK", 192)
    pieces = nf4.nf4_quantize(weight)
    assert torch.equal(whole[0], pieces[0])
    assert torch.equal(whole[1], pieces[1])
    assert torch.equal(values, nf4.nf4_dequantize(*pieces, None, None, (count,), dtype=torch.bfloat16))


def test_nan_and_infinity_are_treated_as_in_the_reference(make_weight):
    for bad in (float("nan"), float("inf"), -float("inf")):
        weight = make_weight((300,))
        weight[[5, 70, 299]] = bad
        packed, absmax = nf4.nf4_quantize(weight)
        wanted = nf4.quantize_reference(weight, 64)
        assert torch.equal(packed, wanted[0])
        assert torch.equal(absmax.nan_to_num(-1, -2), wanted[1].nan_to_num(-1, -2))
        for dtype in DTYPES:
            values = nf4.nf4_dequantize(packed, absmax, None, None, (300,), dtype=dtype)
            expected = torch.empty(300, dtype=dtype)
            nf4.dequantize_reference(expected, packed, absmax, None, None, 64)
            assert torch.equal(values.nan_to_num(-1, -2), expected.nan_to_num(-1, -2))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_dequantizes_into_a_buffer(dtype, make_weight):
    packed, absmax = nf4.nf4_quantize(make_weight((33, 66)))
    expected = nf4.nf4_dequantize(packed, absmax, None, None, (33, 66), dtype=dtype)
    buffer = torch.full((33, 66), float("nan"), dtype=dtype)
    assert nf4.nf4_dequantize(packed, absmax, None, None, (33, 66), dtype=dtype, out=buffer) is buffer
    assert torch.equal(buffer, expected)
    opcheck(torch.ops.jindo.nf4_dequantize_, (buffer, packed, absmax, None, None, 64))
    with pytest.raises(ValueError, match=r"got out .* expected .* \(33, 66\), contiguous"):
        nf4.nf4_dequantize(packed, absmax, None, None, (33, 66), dtype=dtype, out=buffer.t())


@pytest.mark.parametrize("blocks", [1, 255, 256, 257, 513])
def test_quantizing_maxima_keeps_a_given_offset(blocks):
    absmax = torch.rand(blocks, generator=torch.Generator().manual_seed(1))
    offset = torch.tensor(0.4321)
    quantized, nested, kept = nf4.nf4_quantize_absmax(absmax, offset)
    assert kept is offset
    assert nested.shape == (-(-blocks // 256),)
    values = nf4.expand_absmax(quantized, nested, offset)
    # The dynamic map's widest gap is 0.0141 between its 256 codes: half of it, times the block's maximum.
    assert torch.all((values - absmax).abs() <= 0.0071 * nested.max())


def test_equal_maxima_survive_double_quantization():
    """absmax - offset is all zero: 0 / 0 inside, code 0 outside, and the maxima come back."""
    absmax = torch.full((300,), 0.25)
    quantized, nested, offset = nf4.nf4_quantize_absmax(absmax)
    assert torch.equal(nested, torch.zeros(2))
    assert torch.equal(nf4.expand_absmax(quantized, nested, offset), absmax)


def test_storage_is_4_127_bits_a_weight():
    count = 64 * 256 * 8
    packed, absmax = nf4.nf4_quantize(torch.randn(count, generator=torch.Generator().manual_seed(0)))
    quantized, nested, offset = nf4.nf4_quantize_absmax(absmax)
    bits = 8 * sum(t.nbytes for t in (packed, quantized, nested))
    assert bits / count == pytest.approx(4.127, abs=5e-4)
    assert offset.nbytes == 4


@pytest.mark.parametrize(
    "name", ["llama_1b_nf4", "llama_1b_nf4_double_quant", "phi3_5_mini_nf4_dq", "qwen2_5_1_5b_nf4_dq"]
)
def test_real_checkpoints_dequantize_exactly(name, assets):
    """Slices of published bitsandbytes checkpoints, dequantized by its CUDA kernel."""
    tensors = load_file(assets / "bnb_nf4_slices" / f"{name}.safetensors")
    state = json.loads(bytes(tensors["w.weight.quant_state.bitsandbytes__nf4"].tolist()))
    nested = tensors.get("w.weight.nested_absmax")
    offset = torch.tensor(state["nested_offset"]) if nested is not None else None
    values = nf4.nf4_dequantize(
        tensors["w.weight"], tensors["w.weight.absmax"], nested, offset, tuple(state["shape"]), dtype=torch.bfloat16
    )
    assert torch.equal(values, tensors["expected_bf16"])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_opcheck(dtype, make_weight):
    weight = make_weight((13, 7), dtype)
    ops = torch.ops.jindo
    opcheck(ops.nf4_quantize, (weight, 64))
    packed, absmax = nf4.nf4_quantize(weight)
    opcheck(ops.nf4_quantize_absmax, (absmax, absmax.mean()))
    opcheck(ops.nf4_dequantize, (packed, absmax, None, None, [13, 7], 64, dtype))
    quantized, nested, offset = nf4.nf4_quantize_absmax(absmax)
    opcheck(ops.nf4_dequantize, (packed, quantized, nested, offset, [13, 7], 64, dtype))


def test_compiles_into_one_graph(make_weight):
    def round_trip(weight):
        packed, absmax = nf4.nf4_quantize(weight)
        parts = nf4.nf4_quantize_absmax(absmax)
        return nf4.nf4_dequantize(packed, *parts, weight.shape, dtype=torch.bfloat16) * 2

    weight = make_weight((40, 33))
    compiled = torch.compile(round_trip, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(weight), round_trip(weight))


@pytest.mark.parametrize(
    ("weight", "block_size", "error", "message"),
    [
        (torch.zeros(4, dtype=torch.int32), 64, TypeError, "int32"),
        (torch.zeros(0, 5), 64, ValueError, r"\(0, 5\)"),
        (torch.zeros(4), 0, ValueError, "block_size 0"),
        (torch.zeros(4), 63, ValueError, "block_size 63"),
    ],
)
def test_quantize_refuses(weight, block_size, error, message):
    with pytest.raises(error, match=message):
        nf4.nf4_quantize(weight, block_size)


def test_quantize_absmax_refuses_other_dtypes():
    with pytest.raises(TypeError, match="float16"):
        nf4.nf4_quantize_absmax(torch.zeros(4, dtype=torch.float16))
    with pytest.raises(TypeError, match=r"\(2, 2\)"):
        nf4.nf4_quantize_absmax(torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dtype": torch.int8}, TypeError, "int8"),
        ({"packed": torch.zeros(31, dtype=torch.uint8)}, ValueError, "31 bytes, expected uint8 with 32"),
        ({"packed": torch.zeros(32, dtype=torch.int8)}, ValueError, "int8"),
        ({"absmax": torch.zeros(2)}, ValueError, "2 values, expected 1"),
        ({"absmax": torch.zeros(1, dtype=torch.float16)}, TypeError, "float16"),
        ({"absmax": torch.zeros(1, dtype=torch.uint8)}, ValueError, "nested_absmax and offset are missing"),
        ({"nested_absmax": torch.zeros(1)}, ValueError, "expected a uint8 one"),
        (
            {
                "absmax": torch.zeros(1, dtype=torch.uint8),
                "nested_absmax": torch.zeros(2),
                "offset": torch.zeros(()),
            },
            ValueError,
            "2 values, expected fp32 with 1",
        ),
    ],
)
def test_dequantize_refuses(change, error, message):
    good = {
        "packed": torch.zeros(32, dtype=torch.uint8),
        "absmax": torch.zeros(1),
        "nested_absmax": None,
        "offset": None,
        "shape": (64,),
        "dtype": torch.float32,
    }
    with pytest.raises(error, match=message):
        nf4.nf4_dequantize(**(good | change))


def test_a_filled_buffer_is_known_to_autograd():
    """A buffer that was saved for a backward pass must not pass for unchanged: kernels write behind autograd's back."""
    weight = torch.randn(4, 64)
    packed, absmax = nf4.nf4_quantize(weight)
    out = torch.zeros(4, 64)
    y = (torch.ones(4, 64, requires_grad=True) * out).sum()
    nf4.nf4_dequantize(packed, absmax, None, None, (4, 64), dtype=torch.float32, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": torch.zeros(1, dtype=torch.float64)}, "offset is torch.float64"),
        ({"offset": torch.zeros(2)}, "offset is torch.float32 with 2 values"),
        ({"absmax": torch.zeros(1, dtype=torch.uint8).expand(256)}, "absmax has strides"),
        ({"nested_absmax": torch.zeros(1, device="meta")}, "on meta, expected contiguous on cpu"),
        ({"out": torch.zeros(256, 64, device="meta")}, "on meta, expected"),
    ],
)
def test_dequantize_refuses_what_the_kernels_would_misread(change, message):
    packed, absmax = nf4.nf4_quantize(torch.ones(256, 64))
    quantized, nested, offset = nf4.nf4_quantize_absmax(absmax)
    good = {"packed": packed, "absmax": quantized, "nested_absmax": nested, "offset": offset}
    with pytest.raises(ValueError, match=message):
        nf4.nf4_dequantize(**(good | change), shape=(256, 64), dtype=torch.float32)
