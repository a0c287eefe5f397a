"""Files of torch.save: read by their records; code, bombs and lies are refused."""

from __future__ import annotations

import os
import pickle
import random
import zipfile

import pytest
import torch
from torch import nn

from jindo_core.errors import InputError
from jindo_core.formats.torch_file import read_records


@pytest.fixture
def file(tmp_path):
    return tmp_path / "x.bin"


def refused(file, message):
    with pytest.raises(InputError, match=message) as caught:
        read_records(file)
    assert "\n" not in str(caught.value)


def rewrite(file, change, compression=zipfile.ZIP_STORED):
    """The archive again, with `change(name, bytes)` in place of each record."""
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in records.items():
            if not name.endswith(".format_version"):  # it makes torch work offsets out instead of reading them
                archive.writestr(name, change(name, data))


def test_reads_what_torch_saved(file):
    base = torch.randn(6, 10)
    tensors = {
        "plain": base, "tied": base, "transposed": base.t(), "row": base[2], "part": base[1:5, 3:7],
        "half": torch.randn(33).half(), "bf16": torch.randn(3, 3, 3).bfloat16(), "bytes": torch.arange(9).byte(),
        "scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "parameter": nn.Parameter(torch.randn(2)),
    }  # fmt: skip
    torch.save(tensors, file)
    places = read_records(file)
    assert places.keys() == tensors.keys()
    for name, place in places.items():
        value = place.read()
        assert value.dtype == tensors[name].dtype
        assert torch.equal(value, tensors[name]), name
        assert value.is_contiguous()


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_a_pickle_that_needs_more_than_weights_is_refused_and_not_run(file, tmp_path):
    marker = tmp_path / "ran"
    torch.save({"w": torch.ones(2), "x": Evil(str(marker))}, file)
    refused(file, "needs more than weights .*mkdir")
    torch.save(nn.Linear(2, 2), file)
    refused(file, "needs more than weights .*Linear")
    file.write_bytes(pickle.dumps(Evil(str(marker))))
    refused(file, "truncated, or of the format before torch 1.6")
    assert not marker.exists()


def test_tensors_larger_than_their_storage_are_refused(file):
    torch.save({"bomb": torch.zeros(1).expand(1 << 30)}, file)  # 4 GB from a file of a kilobyte
    assert file.stat().st_size < 2000
    refused(file, "the tensor bomb in .* needs more bytes than its storage")
    torch.save({"bomb": torch.zeros(8).as_strided((5, 4), (1, 1))}, file)
    refused(file, "the tensor bomb in .* needs more bytes than its storage")


def test_storages_larger_than_their_record_are_refused(file):
    torch.save({"w": torch.ones(100), "v": torch.ones(3)}, file)
    rewrite(file, lambda name, data: data)
    assert torch.equal(read_records(file)["w"].read(), torch.ones(100))
    rewrite(file, lambda name, data: data[:200] if name.endswith("data/0") else data)
    refused(file, "truncated or corrupt|the storage of w in .* is larger than its record")


def test_the_other_byte_order_is_refused(file):
    torch.save({"w": torch.ones(100)}, file)
    rewrite(file, lambda name, data: b"big" if name.endswith("byteorder") else data)
    refused(file, "big-endian")


def test_compressed_records_are_refused(file):
    torch.save({"w": torch.ones(100)}, file)
    rewrite(file, lambda name, data: data, zipfile.ZIP_DEFLATED)
    refused(file, "is corrupt|truncated or corrupt")


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([torch.ones(2)], "holds a list, expected a state dict"),
        ({1: torch.ones(2)}, "holds a dict, expected a state dict"),
        ({"w": 3.0}, "holds a float under w, expected a plain tensor"),
        ({"model": {"w": torch.ones(2)}}, "holds a dict under model"),
    ],
)
def test_what_is_no_state_dict_is_refused(file, held, message):
    torch.save(held, file)
    refused(file, message)
    torch.save({"w": torch.eye(3).to_sparse()}, file)
    refused(file, "under w, expected a plain tensor|needs more than weights")


def test_the_old_format_and_cut_files_are_refused(file):
    tensors = {"w": torch.randn(50, 50), "v": torch.randn(7)}
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    refused(file, "of the format before torch 1.6")
    torch.save(tensors, file)
    whole = file.read_bytes()
    for size in (0, 3, 100, 1000, len(whole) - 1, len(whole) - 100):
        file.write_bytes(whole[:size])
        refused(file, "truncated")
    file.unlink()
    refused(file, "is missing: download")


def test_no_flipped_byte_raises_anything_else(file):
    """Of the pickle, the zip's headers and its table: wrong in one line, or read as tensors within the file."""
    torch.save({"a.weight": torch.ones(4, 4), "b.weight": torch.ones(7)}, file)
    whole = file.read_bytes()
    draw = random.Random(1)
    refusals = []
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        try:
            for place in read_records(file).values():
                assert place.start + place.nbytes <= len(whole)
                place.read()
        except InputError as error:
            refusals.append(str(error))
    assert not any("\n" in refusal for refusal in refusals)
    assert len(refusals) > 20
