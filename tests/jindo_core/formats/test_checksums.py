"""Checksums of tensors: of the bytes, whatever holds them."""

from __future__ import annotations

import json
import zlib

import pytest
import torch

from jindo_core.errors import InputError
from jindo_core.formats.checksums import checksum, checksums, read_checksums, verify


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool])
def test_is_the_crc_of_the_bytes(dtype):
    value = (torch.arange(12) % 2).view(3, 4).to(dtype)
    expected = zlib.crc32(bytes(value.view(-1).view(torch.uint8).tolist()))
    assert checksum(value) == f"{expected:08x}"
    assert checksum(value.t().contiguous().t()) == checksum(value)
    assert checksum(torch.nn.Parameter(value, requires_grad=False)) == checksum(value)


def test_scalars_and_nothing_have_one():
    assert checksum(torch.tensor(1.0)) == f"{zlib.crc32(bytes([0, 0, 128, 63])):08x}"
    assert checksum(torch.empty(0, 3)) == "00000000"


def test_metadata_goes_there_and_back(tmp_path):
    tensors = {"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.uint8)}
    metadata = checksums(tensors)
    assert all(isinstance(value, str) for value in metadata.values())
    assert json.loads(metadata["checksums"]) == {name: checksum(value) for name, value in tensors.items()}
    assert read_checksums(metadata, tmp_path) == json.loads(metadata["checksums"])
    assert read_checksums({"format": "pt"}, tmp_path) is None
    assert read_checksums(checksums({}), tmp_path) == {}
    for damaged in ('{"a": ' + "9" * 5000 + "}", "[" * 200_000):
        with pytest.raises(InputError, match="no readable checksums"):
            read_checksums(metadata | {"checksums": damaged}, tmp_path)


def test_every_flipped_bit_changes_it(tmp_path):
    value = torch.arange(40, dtype=torch.uint8)
    whole = checksum(value)
    verify("a", value, whole, tmp_path)
    for position in range(40):
        for bit in range(8):
            damaged = value.clone()
            damaged[position] ^= 1 << bit
            with pytest.raises(InputError, match=r"the tensor a in .* is damaged"):
                verify("a", damaged, whole, tmp_path)
