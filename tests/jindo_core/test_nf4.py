"""NF4Weight and NF4Linear: the keys and bits of bitsandbytes, and what moving and saving must not change."""

from __future__ import annotations

import json

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from jindo_core.nf4 import STATE_KEY, NF4Linear, NF4Weight, is_finite, quantize_nf4


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(192, 320)


@pytest.mark.parametrize("double_quant", [True, False])
def test_state_dict_is_bitsandbytes(linear, double_quant):
    """The keys, dtypes and bytes that bitsandbytes' own Linear4bit writes."""
    theirs = bnb.nn.Linear4bit(192, 320, compress_statistics=double_quant, quant_type="nf4")
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cpu")
    theirs.weight.data  # noqa: B018  quantized by the move
    expected = theirs.state_dict()
    ours = NF4Linear.from_linear(linear, double_quant=double_quant).state_dict()
    assert ours.keys() == expected.keys()
    for key in ours:
        if "quant_state." not in key:
            assert ours[key].dtype == expected[key].dtype, key
            assert torch.equal(ours[key].view(-1), expected[key].view(-1)), key
    # and their reader takes ours
    parts = {key.removeprefix("weight."): value for key, value in ours.items() if key.startswith("weight.")}
    state = bnb.functional.QuantState.from_dict(dict(parts), device=torch.device("cpu"))
    assert state.shape == (320, 192)
    value = bnb.functional.dequantize_4bit(ours["weight"], state)
    assert torch.equal(value, NF4Weight.from_state_dict(ours).dequantize())


def test_reads_what_bitsandbytes_wrote(linear):
    theirs = bnb.nn.Linear4bit(192, 320, quant_type="nf4")
    theirs.load_state_dict(linear.state_dict())
    state = theirs.to("cpu").state_dict()
    ours = NF4Linear.from_linear(nn.Linear(192, 320))
    ours.load_state_dict(state)
    assert torch.equal(ours.nf4.dequantize(), NF4Linear.from_linear(linear).nf4.dequantize())
    assert torch.equal(ours.bias, linear.bias)


def test_storage_is_as_the_paper_says():
    weight = quantize_nf4(torch.randn(1024, 1024))
    assert weight.nbytes * 8 / 1024**2 == pytest.approx(4.127, abs=1e-3)
    assert quantize_nf4(torch.randn(1024, 1024), double_quant=False).nbytes * 8 / 1024**2 == pytest.approx(4.5)


def test_casting_the_model_never_casts_the_maxima(linear):
    layer = NF4Linear.from_linear(linear, double_quant=False)
    before = layer.nf4.dequantize(torch.float32)
    layer.to(torch.bfloat16).half()
    assert layer.absmax.dtype == torch.float32
    assert layer.weight.dtype == torch.uint8
    assert layer.bias.dtype == torch.float16
    assert torch.equal(layer.nf4.dequantize(torch.float32), before)


def test_is_a_linear_and_equals_one_on_the_dequantized_weight(linear):
    layer = NF4Linear.from_linear(linear)
    assert isinstance(layer, nn.Linear)
    x = torch.randn(3, 5, 192, requires_grad=True)
    expected = nn.functional.linear(x, layer.nf4.dequantize(), linear.bias)
    torch.testing.assert_close(layer(x), expected)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.nf4.dequantize().sum(0).expand_as(x))


def test_a_state_that_does_not_fit_is_refused(linear):
    state = NF4Linear.from_linear(linear).state_dict()
    with pytest.raises(RuntimeError, match=r"shape \(320, 192\), expected \(192, 320\)"):
        NF4Linear.from_linear(nn.Linear(320, 192)).load_state_dict(state)
    del state["weight.nested_absmax"]
    with pytest.raises(RuntimeError, match="double-quantized"):
        NF4Linear.from_linear(linear).load_state_dict(state)
    with pytest.raises(RuntimeError, match="Missing key"):
        NF4Linear.from_linear(linear).load_state_dict(linear.state_dict())


DAMAGED = {
    "described as": [
        ({"blocksize": 0}, "blocksize 0, expected one of"),
        ({"blocksize": "64"}, "blocksize '64'"),
        ({"blocksize": True}, "blocksize True"),
        ({"blocksize": 10**9}, "blocksize 1000000000"),
        ({"dtype": "load"}, "dtype 'load', expected a floating dtype"),
        ({"dtype": ["float32"]}, "dtype .* expected a floating dtype"),
        ({"quant_type": "fp4"}, "quant_type 'fp4'"),
        ({"shape": [320, True]}, r"shape \[320, True\], expected sizes"),
        ({"shape": []}, "shape"),
        ({"shape": [10**30, 192]}, "packed is"),
        ({"nested_offset": "a"}, "nested_offset 'a', expected a number"),
        ({"nested_offset": True}, "nested_offset True"),
        ({"nested_offset": None}, "nested_offset None"),
        ({"nested_offset": float("nan")}, "offset that is not finite"),
        ({"nested_offset": float("-inf")}, "offset that is not finite"),
        ({"nested_offset": 10**400}, "offset that is not finite"),
        ({"nested_blocksize": 128}, "nested_blocksize 128, expected 256"),
    ],
    "tensors": [
        ("nested_absmax", lambda t: t.index_fill(0, torch.tensor([0]), torch.nan), "nested_absmax that is not finite"),
        ("nested_absmax", lambda t: t.double(), "nested_absmax is torch.float64"),
        ("absmax", lambda t: t[:-1], "absmax has 959 values"),
        ("absmax", lambda t: t.double(), "absmax is torch.float64"),
        ("quant_map", lambda t: t.double(), "other codes"),
        ("quant_map", lambda t: t[:3], "other codes"),
        ("nested_quant_map", lambda t: t.half(), "another map"),
        (STATE_KEY, lambda t: t[:-1], "delimiter"),
        (STATE_KEY, lambda t: t.float(), "expected uint8"),
    ],
}


@pytest.mark.parametrize("double_quant", [True, False])
def test_damaged_parts_are_refused_by_every_reader(linear, double_quant):
    """ValueError by `from_state_dict`, and torch's own error by `load_state_dict`; nothing is taken."""
    layer = NF4Linear.from_linear(linear, double_quant=double_quant)
    whole = layer.state_dict()
    before = layer.nf4.dequantize()
    described = json.loads(bytes(whole[f"weight.{STATE_KEY}"].tolist()))
    cases = [
        (
            STATE_KEY,
            lambda _, c=changes: torch.tensor(list(json.dumps(described | c).encode()), dtype=torch.uint8),
            said,
        )
        for changes, said in DAMAGED["described as"]
        if double_quant or not any(key.startswith("nested") for key in changes)
    ]
    cases += [case for case in DAMAGED["tensors"] if f"weight.{case[0]}" in whole]
    for part, change, said in cases:
        state = whole | {f"weight.{part}": change(whole[f"weight.{part}"])}
        with pytest.raises(ValueError, match=said):
            NF4Weight.from_state_dict(state)
        with pytest.raises(RuntimeError, match=said):
            layer.load_state_dict(state)
    if not double_quant:
        state = whole | {"weight.absmax": whole["weight.absmax"] * torch.inf}
        with pytest.raises(ValueError, match="absmax that is not finite"):
            NF4Weight.from_state_dict(state)
    assert torch.equal(layer.nf4.dequantize(), before)
    with pytest.raises(RuntimeError, match=r"bias has shape \(7,\), expected \(320,\)"):
        layer.load_state_dict(whole | {"bias": torch.zeros(7)})


def test_a_missing_part_is_named(linear):
    layer = NF4Linear.from_linear(linear)
    for part in ("absmax", "quant_map", "nested_quant_map"):
        state = layer.state_dict()
        del state[f"weight.{part}"]
        with pytest.raises(KeyError, match=f"weight.{part}"):
            NF4Weight.from_state_dict(state)
        with pytest.raises(RuntimeError, match=rf"weight\.{part} is missing"):
            layer.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_is_read_back(dtype):
    weight = quantize_nf4(torch.randn(64, 64, dtype=dtype))
    again = NF4Weight.from_state_dict(weight.state_dict())
    assert again.dtype == dtype
    assert torch.equal(again.dequantize(), weight.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_is_finite(dtype):
    value = torch.randn(67, 5, dtype=dtype)
    assert is_finite(value)
    assert is_finite(value.t())
    assert is_finite(value[:0])
    assert is_finite(torch.full((3,), torch.finfo(dtype).max, dtype=dtype))
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoilt = value.clone()
        spoilt[66, 4] = bad
        assert not is_finite(spoilt)
        assert not is_finite(spoilt.t())


def test_a_placeholder_takes_its_weight_later(linear):
    layer = NF4Linear.placeholder(192, 320, bias=True, dtype=torch.bfloat16)
    assert layer.is_placeholder
    assert "no weight yet" in repr(layer)
    assert {name: (tuple(p.shape), p.device.type) for name, p in layer.named_parameters()} == {
        "weight": ((320, 192), "meta"), "bias": ((320,), "meta"),
    }  # fmt: skip
    assert list(layer.state_dict()) == ["weight", "bias"]
    layer.hold(quantize_nf4(linear.weight))
    layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    expected = NF4Linear.from_linear(linear)
    assert not layer.is_placeholder
    assert layer.state_dict().keys() == expected.state_dict().keys()
    x = torch.randn(20, 192)
    assert torch.equal(layer(x), expected(x))


def test_no_two_layers_share_what_they_save(linear):
    """safetensors refuses tensors with common memory."""
    states = [NF4Linear.from_linear(linear).state_dict() for _ in range(2)]
    for key in states[0]:
        if key != "bias":
            assert states[0][key].data_ptr() != states[1][key].data_ptr(), key


def test_product_dtype(linear):
    """x's own, compute_dtype's, or autocast's; the result in x's dtype, or autocast's."""
    layer = NF4Linear.from_linear(linear)
    x, weight = torch.randn(20, 192), layer.nf4.dequantize()
    assert torch.equal(layer(x.bfloat16()), x.bfloat16() @ weight.bfloat16().t() + linear.bias.bfloat16())
    layer.compute_dtype = torch.float32
    assert torch.equal(layer(x.bfloat16()), (x.bfloat16().float() @ weight.t() + linear.bias).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), x.bfloat16() @ weight.bfloat16().t() + linear.bias.bfloat16())
        assert layer(x.double()).dtype == torch.float64


def test_distributed_checkpoints_know_the_keys(linear):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model = nn.Sequential(NF4Linear.from_linear(linear), nn.LayerNorm(320))
    state = get_model_state_dict(model)
    assert state.keys() == model.state_dict().keys()
    trained = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    assert {"1.weight", "1.bias"} <= trained.keys()
    assert "0.weight" not in trained
