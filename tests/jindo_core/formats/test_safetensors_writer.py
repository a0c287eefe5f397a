"""Safetensors written a tensor at a time: what the safetensors package and transformers' index expect."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from jindo_core.errors import InputError
from jindo_core.formats.safetensors_writer import SafetensorsWriter, verify_safetensors

TENSORS = {
    "a.weight": torch.randn(7, 5),
    "b.weight": torch.randn(3, 4).bfloat16(),
    'odd "name" 이름': torch.arange(9, dtype=torch.uint8),
    "c": torch.randn(64).half(),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(3.5),
}
SIZES = {name: value.nbytes for name, value in TENSORS.items()}


def write(folder, limit, **options):
    with SafetensorsWriter(folder, SIZES, limit, **options) as writer:
        for name, value in TENSORS.items():
            writer.write(name, value)
    return writer.written


@pytest.mark.parametrize("checksums", [False, True])
def test_one_file(tmp_path, checksums):
    written = write(tmp_path, 10**9, checksums=checksums)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in TENSORS.items())
    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "pt"
    assert ("checksums" in metadata) == checksums
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    verify_safetensors(written)


@pytest.mark.parametrize(("limit", "count"), [(1, 6), (160, 3), (170, 2), (10**6, 1)])
def test_shards(tmp_path, limit, count):
    """A shard is at most `limit` bytes of tensors, unless one alone is more; names and index as transformers'."""
    verify_safetensors(write(tmp_path, limit, checksums=True))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == count
    if count == 1:
        return
    assert [file.name for file in files] == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(SIZES.values())
    for file in files:
        held = load_file(file)
        assert {name for name, place in index["weight_map"].items() if place == file.name} == held.keys()
        assert sum(value.nbytes for value in held.values()) <= limit or sum(v.numel() > 0 for v in held.values()) == 1
        assert all(torch.equal(value, TENSORS[name]) for name, value in held.items())


def test_a_bound_larger_than_the_tensor_is_room_only(tmp_path):
    with SafetensorsWriter(tmp_path, {"a": 1000, "b": 1000}, 10**9) as writer:
        writer.write("a", torch.ones(3))
        writer.write("b", torch.ones(2, dtype=torch.bfloat16))
    found = load_file(tmp_path / "model.safetensors")
    assert {name: value.tolist() for name, value in found.items()} == {"a": [1.0, 1.0, 1.0], "b": [1.0, 1.0]}


def test_a_flipped_bit_is_found(tmp_path):
    written = write(tmp_path, 10**9)
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-70] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"the tensor c in .* is damaged"):
        verify_safetensors(written)
    with pytest.raises(InputError, match="differs in the tensor missing"):
        verify_safetensors(written | {"missing": (file, "0")})


def test_order_and_number_are_held_to(tmp_path):
    with pytest.raises(ValueError, match="b came, expected a"), SafetensorsWriter(tmp_path, {"a": 4, "b": 4}, 99) as w:
        w.write("b", torch.ones(1))
    never = pytest.raises(ValueError, match="b was announced and never written")
    with never, SafetensorsWriter(tmp_path, {"a": 4, "b": 4}, 99) as writer:
        writer.write("a", torch.ones(1))
