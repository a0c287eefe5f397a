"""Meta's format: an archive that torch.load reads, and params.json from which Meta's code works out the same sizes."""

from __future__ import annotations

import struct
import zipfile

import pytest
import torch

from jindo_core.config_json import ConfigReader
from jindo_core.errors import InputError
from jindo_core.formats.meta import _rope_scaling
from jindo_core.formats.meta_writer import meta_params, verify_pth, write_pth
from jindo_core.model import LlamaConfig

SIZES = {"vocab_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 8}


def config(dim=4096, ffn=11008, heads=32, **more):
    sizes = {"hidden_size": dim, "intermediate_size": ffn, "num_attention_heads": heads, "head_dim": dim // heads}
    return LlamaConfig(**SIZES | sizes | more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_reads_it_plainly_and_mapped(tmp_path, dtype):
    values = {"a": torch.randn(5, 7), "layers.0.b": torch.randn(3), "c": torch.ones(0, 2)}
    tensors = {name: value.to(dtype) for name, value in values.items()}
    file = tmp_path / "consolidated.00.pth"
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    digests = write_pth(file, shapes, dtype, iter(tensors.values()))
    for mapped in (False, True):
        found = torch.load(file, weights_only=True, mmap=mapped)
        assert list(found) == list(tensors)
        assert all(torch.equal(found[name], value) and found[name].is_contiguous() for name, value in tensors.items())
    assert zipfile.ZipFile(file).testzip() is None
    verify_pth(file, digests)


def test_tensors_begin_at_multiples_of_64(tmp_path):
    file = tmp_path / "x.pth"
    shapes = {f"t{i}": (i + 1,) for i in range(12)}
    write_pth(file, shapes, torch.float16, (torch.full(shape, 7.0).half() for shape in shapes.values()))
    content = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if "/data/" in entry.filename:
                head = content[entry.header_offset :]
                name_length, extra_length = struct.unpack("<HH", head[26:30])
                start = entry.header_offset + 30 + name_length + extra_length
                assert start % 64 == 0
                assert content[start : start + 2] == torch.tensor([7.0]).half().numpy().tobytes()


def test_wrong_bytes_and_wrong_shapes(tmp_path):
    file = tmp_path / "x.pth"
    digests = write_pth(file, {"a": (64,)}, torch.float32, iter([torch.ones(64)]))
    content = file.read_bytes()
    file.write_bytes(content.replace(torch.ones(64).numpy().tobytes(), torch.full((64,), 2.0).numpy().tobytes()))
    with pytest.raises(InputError, match=r"the tensor a in .* is damaged"):
        verify_pth(file, digests)
    file.write_bytes(content[:-30])
    with pytest.raises(InputError, match="is truncated"):
        verify_pth(file, digests)
    with pytest.raises(ValueError, match=r"expected torch.float32"):
        write_pth(file, {"a": (64,)}, torch.float32, iter([torch.ones(64).half()]))


def width(params):
    """As Meta's FeedForward works it out (llama/model.py)."""
    hidden = int(2 * (4 * params["dim"]) / 3)
    if params.get("ffn_dim_multiplier") is not None:
        hidden = int(params["ffn_dim_multiplier"] * hidden)
    return params["multiple_of"] * ((hidden + params["multiple_of"] - 1) // params["multiple_of"])


@pytest.mark.parametrize(
    ("dim", "ffn", "published"),
    [
        (4096, 11008, {"multiple_of": 256}),
        (5120, 13824, {"multiple_of": 256}),
        (8192, 28672, {"multiple_of": 4096, "ffn_dim_multiplier": 1.3}),
        (4096, 14336, {"multiple_of": 1024, "ffn_dim_multiplier": 1.3}),
        (2048, 8192, {"multiple_of": 256, "ffn_dim_multiplier": 1.5}),
        (576, 1536, {}), (64, 172, {}), (2048, 5632, {}), (4096, 14848, {}), (100, 7, {}), (96, 4097, {}),
    ],
)  # fmt: skip
def test_the_feed_forward_width_comes_out(dim, ffn, published):
    params = meta_params(config(dim, ffn, heads=4))
    assert width(params) == ffn
    if published:
        assert width({"dim": dim, **published}) == ffn  # what Meta published for this size


def test_only_what_differs_from_the_defaults_is_named():
    assert "n_kv_heads" not in meta_params(config(num_key_value_heads=32))
    assert "rope_theta" not in meta_params(config())
    params = meta_params(config(rope_theta=500000.0))
    assert (params["n_kv_heads"], params["rope_theta"]) == (8, 500000.0)
    rope = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    assert meta_params(config(rope=rope))["use_scaled_rope"] is True
    assert "rope_scaling_factor" not in meta_params(config(rope=rope))
    assert meta_params(config(rope=rope | {"factor": 32.0}))["rope_scaling_factor"] == 32.0
    assert meta_params(config(2048, 8192, rope=rope))["rope_scaling_factor"] == 8.0


@pytest.mark.parametrize("dim", [1024, 2048, 3072, 4096, 8192])
@pytest.mark.parametrize("factor", [8.0, 16.0, 32.0])
def test_the_scaling_factor_comes_back(dim, factor):
    """Named or not: the reader's rule is that of what Meta published."""
    rope = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    params = meta_params(config(dim, 4 * dim, rope=rope))
    assert _rope_scaling(ConfigReader(params)) == rope
    published = (dim in (2048, 3072) and factor == 32) or (dim in (4096, 8192) and factor == 8)
    assert not (published and "rope_scaling_factor" in params)


@pytest.mark.parametrize(
    "more",
    [{"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 64}, {"rope": {"rope_type": "linear", "factor": 2.0}}],
)
def test_what_the_format_has_no_place_for(more):
    with pytest.raises(InputError, match="give --format safetensors"):
        meta_params(config(**more))
