"""Reading a safetensors header: what the package writes is read, what it lets pass but should not is refused."""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from jindo_core.errors import InputError
from jindo_core.formats.safetensors_file import DTYPES, read_header

A = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
TWICE = f'{{{A},"a":{{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}}}'


def write(path, header, data=b"\0" * 16):
    text = header.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_reads_what_safetensors_wrote(tmp_path):
    file = tmp_path / "x.safetensors"
    tensors = {f"t.{name}": (torch.arange(12) % 2).view(3, 4).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3)}
    save_file(tensors, file, metadata={"format": "pt", "k": "v"})
    places, metadata = read_header(file)
    assert metadata == {"format": "pt", "k": "v"}
    assert places.keys() == tensors.keys()
    for name, place in places.items():
        value = place.read()
        assert value.dtype == tensors[name].dtype
        assert value.shape == tensors[name].shape
        assert torch.equal(value.view(-1).view(torch.uint8), tensors[name].view(-1).view(torch.uint8)), name


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (TWICE, "names 'a' twice"),
        (f'{{{A},"b":{{"dtype":"F32","shape":[3],"data_offsets":[4,16]}}}}', "the tensor b overlaps a"),
        (f'{{{A},"b":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}}}', "overlaps"),
        (f'{{{A},"b":{{"dtype":"F32","shape":[1],"data_offsets":[12,16]}}}}', "the tensor b leaves a gap after a"),
        (f"{{{A}}}", r"bytes, \d+ in its header"),
        (f'{{{A},"b":{{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}}}', r"bytes, \d+ in its header"),
        ('{"../../x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', "expected a name without slashes"),
        ('{"":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', "expected a name without slashes"),
        ('{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}', "has shape"),
        ('{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}', "has -16 bytes"),
        ('{"a":{"dtype":"F32","shape":[5],"data_offsets":[0,16]}}', "has 16 bytes"),
        ('{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,16]}}', "has shape"),
        ('{"a":{"dtype":"F4","shape":[4],"data_offsets":[0,16]}}', "is of type F4, expected"),
        ('{"a":{"dtype":["F32"],"shape":[4],"data_offsets":[0,16]}}', r"is of type \['F32'\], expected"),
        ('{"a":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,16]}}', "no JSON"),
        ('{"a":7}', "is of type None"),
        ('{"__metadata__":{"k":1}}', "metadata is no object of strings"),
        ("[]", "no JSON object"),
        ("{" + "x" * 10, "no JSON"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, header, message):
    file = write(tmp_path / "x.safetensors", header)
    with pytest.raises(InputError, match=message):
        read_header(file)


def test_safetensors_itself_takes_a_key_twice(tmp_path):
    """Why the header is read here: the day the package refuses it too, this module has one reason less."""
    file = write(tmp_path / "x.safetensors", TWICE)
    with safe_open(file, framework="pt") as opened:
        assert list(opened.keys()) == ["a"]


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1000)}, file)
    place = read_header(file).places["a"]
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match="became shorter"):
        place.read()
    file.unlink()
    with pytest.raises(InputError, match="can't be read"):
        place.read()


def test_no_flipped_byte_of_a_header_raises_anything_else(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"a.weight": torch.ones(4, 4), "b.weight": torch.ones(7)}, file, metadata={"format": "pt"})
    whole = file.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(0)
    refusals = []
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[draw.randrange(length)] = draw.randrange(256)
        file.write_bytes(damaged)
        try:
            read_header(file)
        except InputError as error:
            refusals.append(str(error))
    assert not any("\n" in refusal for refusal in refusals)
    assert len(refusals) > 200  # the others spell another name, which the loader misses


def test_a_header_is_read_without_its_tensors(tmp_path):
    """A sparse file of 1 TB opens at once."""
    count = 1 << 38
    text = json.dumps({"a": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
    file = tmp_path / "x.safetensors"
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + 4 * count)
    assert read_header(file).places["a"].shape == (count,)
