"""Hugging Face's layout: .bin beside safetensors, bitsandbytes' NF4 and our own, and what is refused."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from jindo_core.errors import InputError
from jindo_core.formats import open_checkpoint
from jindo_core.formats.bitsandbytes import assemble, group_parts
from jindo_core.formats.checksums import checksums
from jindo_core.formats.safetensors_file import read_header
from jindo_core.loader import load_model
from jindo_core.nf4 import STATE_KEY, NF4Linear, NF4Weight, quantize_nf4

UP = "model.layers.2.mlp.up_proj.weight"


def as_bin(folder, tensors, shards=1):
    """The same checkpoint as .bin; returns its weight_map."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return {}
    weight_map = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        held = {name: tensors[name] for name in sorted(tensors)[i::shards]}
        torch.save(held, folder / file)
        weight_map |= dict.fromkeys(held, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize("shards", [1, 3])
def test_bin_equals_safetensors(copy, ids, shards):
    folder, tensors = copy
    whole = load_model(folder, dtype="fp32", device="cpu")(ids).logits
    as_bin(folder, tensors, shards)
    assert torch.equal(load_model(folder, dtype="fp32", device="cpu")(ids).logits, whole)
    opened = open_checkpoint(folder)
    assert len(opened.files) == shards
    assert opened.nbytes == sum(os.stat(file).st_size for file in opened.files)


def test_safetensors_win_over_bin(copy):
    folder, tensors = copy
    torch.save({"nothing": torch.ones(1)}, folder / "pytorch_model.bin")
    assert open_checkpoint(folder).shapes.keys() == tensors.keys()


def test_bin_shards_that_lie_are_refused(copy, refused, write_index):
    folder, tensors = copy
    weight_map = as_bin(folder, tensors, 3)
    kind = "pytorch_model.bin"
    write_index(folder, kind, weight_map | {UP: "../x.bin"})
    refused(folder, "expected the name of a file beside it")
    write_index(folder, kind, weight_map | {UP: "pytorch_model-00004-of-00003.bin"})
    refused(folder, "is missing: download")
    write_index(folder, kind, {name: file for name, file in weight_map.items() if name != UP})
    refused(folder, f"holds, beyond what the index says, the tensor {UP}")
    write_index(folder, kind, weight_map)
    torch.save({"evil": print}, folder / weight_map[UP])
    refused(folder, "needs more than weights")
    (folder / weight_map[UP]).unlink()
    refused(folder, "is missing: download")


# --- bitsandbytes ---------------------------------------------------------------------------------------


@pytest.fixture
def bnb_model(stories260k):
    def make(double_quant, skip=("lm_head",)):
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=list(skip),
        )  # fmt: skip
        return AutoModelForCausalLM.from_pretrained(
            stories260k, quantization_config=config, dtype=torch.float32, device_map="cpu"
        )

    return make


@pytest.mark.parametrize(("double_quant", "shard_size"), [(True, "5GB"), (True, "150KB"), (False, "5GB")])
def test_bitsandbytes_checkpoints_are_taken_as_they_are(bnb_model, tmp_path, ids, double_quant, shard_size):
    theirs = bnb_model(double_quant, ["lm_head", "o_proj"])
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    ours = load_model(tmp_path, dtype="fp32", device="cpu", double_quant=not double_quant)
    opened = open_checkpoint(tmp_path)
    assert (len(opened.files) > 1) == (shard_size == "150KB")
    held = {}
    for file in opened.files:
        held |= load_file(file)
    linears = {path: module for path, module in ours.named_modules() if isinstance(module, NF4Linear)}
    assert len(linears) == 5 * 6
    for path, module in linears.items():
        assert torch.equal(module.nf4.packed, held[f"{path}.weight"])
        assert torch.equal(module.nf4.absmax, held[f"{path}.weight.absmax"])
        assert (module.nf4.nested_absmax is not None) == double_quant
        if double_quant:
            assert torch.equal(module.nf4.nested_absmax, held[f"{path}.weight.nested_absmax"])
    kept = ours.model.layers[0].self_attn.o_proj
    assert type(kept) is torch.nn.Linear
    assert torch.equal(kept.weight, held["model.layers.0.self_attn.o_proj.weight"])
    # With gradients: without, bitsandbytes may repack and round (docs/design.md).
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0)
    whole = load_model(tmp_path, quantize=None, dtype="fp32", device="cpu")
    assert not any(isinstance(module, NF4Linear) for module in whole.modules())
    path = "model.layers.1.mlp.down_proj"
    assert torch.equal(whole.get_submodule(path).weight, linears[path].nf4.dequantize(torch.float32))
    torch.testing.assert_close(whole(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0)


def test_layers_of_a_bitsandbytes_checkpoint_stream(bnb_model, tmp_path, ids):
    bnb_model(True).save_pretrained(tmp_path)
    whole = load_model(tmp_path, dtype="fp32", device="cpu")
    streamed = load_model(tmp_path, dtype="fp32", device="cpu", offload_layers=3)
    with torch.no_grad():
        assert torch.equal(streamed(ids).logits, whole(ids).logits)


@pytest.mark.parametrize(
    "name", ["llama_1b_nf4", "llama_1b_nf4_double_quant", "phi3_5_mini_nf4_dq", "qwen2_5_1_5b_nf4_dq"]
)
def test_slices_of_published_checkpoints(assets, name):
    """Against what bitsandbytes' CUDA kernel made of the same bytes."""
    file = assets / "bnb_nf4_slices" / f"{name}.safetensors"
    places = read_header(file).places
    parts = group_parts(places)
    assert list(parts) == ["w.weight"]
    weight = assemble("w.weight", {part: places[part].read() for part in parts["w.weight"]}, file)
    assert torch.equal(weight.dequantize(), places["expected_bf16"].read())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "is quantized with 'gptq': expected bitsandbytes' NF4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "in bitsandbytes' 8 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "quantized in 'fp4'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantized in 'fp4'"),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
            "stores its 4-bit weights as 'bfloat16'",
        ),
        ("nf4", "quantization_config 'nf4', expected an object"),
    ],
)
def test_other_quantizations_are_refused(copy, refused, settings, message):
    folder, _ = copy
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    refused(folder, message)


# --- our own, and what can be wrong with NF4 -------------------------------------------------------------


def parts_of(weight, name):
    # The code maps are one tensor for all weights, which safetensors does not write.
    return {key: value.clone() for key, value in weight.state_dict(name).items()}


def nf4_tensors(tensors, **options):
    """The tensors of a checkpoint with its layers' linears in NF4, under bitsandbytes' keys."""
    held = {}
    for name, value in tensors.items():
        held |= parts_of(quantize_nf4(value, **options), name) if "_proj." in name else {name: value}
    return held


@pytest.mark.parametrize("double_quant", [True, False])
def test_our_own_checkpoints(copy, ids, double_quant):
    folder, tensors = copy
    whole = load_model(folder, dtype="fp32", device="cpu", double_quant=double_quant)(ids).logits
    held = nf4_tensors(tensors, double_quant=double_quant)
    save_file(held, folder / "model.safetensors", metadata=checksums(held))
    opened = open_checkpoint(folder)
    assert opened.shapes == {name: tuple(value.shape) for name, value in tensors.items()}
    assert opened.quantized == {name for name in tensors if "_proj." in name}
    assert torch.equal(load_model(folder, dtype="fp32", device="cpu")(ids).logits, whole)
    assert torch.equal(opened.read(UP), quantize_nf4(tensors[UP], double_quant=double_quant).dequantize())


def test_a_flipped_bit_is_found_wherever_it_is(copy, refused):
    folder, tensors = copy
    held = nf4_tensors(tensors)
    file = folder / "model.safetensors"
    save_file(held, file, metadata=checksums(held))
    whole, places = file.read_bytes(), read_header(file).places
    layer = [name for name in places if ".layers.3." in name or ".layers." not in name]
    for number, name in enumerate(layer):
        damaged = bytearray(whole)
        place = places[name]
        damaged[place.start + (number * 7919) % place.nbytes] ^= 1 << (number % 8)
        file.write_bytes(damaged)
        refused(folder, rf"the tensor {name} in .*{file.name} is damaged \(checksum")


def test_checksums_that_are_not_whole_are_refused(copy, refused):
    folder, tensors = copy
    file = folder / "model.safetensors"
    good = checksums(tensors)
    for metadata, message in (
        (good | {"jindo_core": "2"}, "is of jindo-core's format '2', expected '1'"),
        (good | {"checksums": "{"}, "no readable checksums"),
        (good | {"checksums": "[]"}, "no readable checksums"),
        (good | {"checksums": "{}"}, "has a tensor or a checksum of "),
        ({"jindo_core": "1"}, "no readable checksums"),
        (checksums({name: value for name, value in tensors.items() if name != UP}), f"a checksum of {UP}"),
        (checksums(tensors | {"odd": torch.ones(1)}), "a checksum of odd"),
    ):
        save_file(tensors, file, metadata=metadata)
        refused(folder, message)


def changed_state(state, **changes):
    """A quant_state with other entries."""
    described = json.loads(bytes(state.tolist())) | changes
    return torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)


def test_nf4_weights_that_do_not_fit_are_refused(copy, refused):
    folder, tensors = copy
    held = nf4_tensors(tensors)
    state = held[f"{UP}.{STATE_KEY}"]

    def altered(message, drop=(), **changes):
        kept = {key: value for key, value in held.items() if key not in {f"{UP}.{part}" for part in drop}}
        save_file(kept | {f"{UP}.{part}": value for part, value in changes.items()}, folder / "model.safetensors")
        refused(folder, message)

    for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"):
        altered(f"the tensor {UP}.{part} is missing|{UP} in .* is damaged", drop=[part])
    altered(f"the tensor {UP} in .* is of type uint8, expected", drop=[STATE_KEY])
    altered("is damaged", absmax=held[f"{UP}.absmax"][:-1])
    altered("nested_absmax that is not finite", nested_absmax=held[f"{UP}.nested_absmax"] * float("nan"))
    altered("other codes than NF4's", quant_map=held[f"{UP}.quant_map"].flip(0))
    altered("another map", nested_quant_map=held[f"{UP}.nested_quant_map"] * 2)
    for changes, message in (
        ({"quant_type": "fp4"}, "quantized with quant_type 'fp4', expected 'nf4'"),
        ({"blocksize": 48}, "blocksize 48, expected one of"),
        ({"blocksize": 128}, "is damaged .absmax has"),
        ({"dtype": "int8"}, "dtype 'int8', expected a floating dtype"),
        ({"shape": [172, -64]}, "shape .* expected sizes"),
        ({"nested_blocksize": 128}, "nested_blocksize 128, expected 256"),
        ({"shape": [172, 640]}, r"has 5504 bytes for the shape \(172, 640\)"),
        ({"shape": [64, 172]}, rf"the tensor {UP} has shape \(64, 172\), expected \(172, 64\)"),
        ({"nested_offset": float("inf")}, "offset that is not finite"),
        ({"nested_offset": "x"}, "is damaged"),
    ):
        altered(message, **{STATE_KEY: changed_state(state, **changes)})
    altered("the quant_state of .* can't be read", **{STATE_KEY: state[:-3]})
    altered("the quant_state of .* can't be read", **{STATE_KEY: state.float()})
    fp4 = {key: value for key, value in held.items() if not key.startswith(UP)}
    fp4 |= {UP: held[UP], f"{UP}.quant_state.bitsandbytes__fp4": state}
    save_file(fp4, folder / "model.safetensors")
    refused(folder, f"the tensor {UP} is quantized in 'fp4'")


def test_other_block_sizes_of_bitsandbytes(copy, ids):
    """128 instead of 64: fewer maxima, the same engine."""
    folder, tensors = copy
    save_file(nf4_tensors(tensors, block_size=128), folder / "model.safetensors")
    model = load_model(folder, dtype="fp32", device="cpu")
    whole = load_model(folder, quantize=None, dtype="fp32", device="cpu")
    assert model.model.layers[0].mlp.up_proj.block_size == 128
    torch.testing.assert_close(model(ids).logits, whole(ids).logits, atol=1e-4, rtol=0)


def test_a_head_in_nf4_is_dequantized(copy, ids):
    """The fused loss takes the head's weight as it is."""
    folder, tensors = copy
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    head = quantize_nf4(torch.randn(512, 64))
    save_file(nf4_tensors(tensors) | parts_of(head, "lm_head.weight"), folder / "model.safetensors")
    model = load_model(folder, dtype="fp32", device="cpu")
    assert torch.equal(model.lm_head.weight, head.dequantize())


def test_assemble_names_the_file(tmp_path):
    weight = quantize_nf4(torch.randn(64, 64))
    state = weight.state_dict("w")
    assert isinstance(assemble("w", state, tmp_path), NF4Weight)
    del state["w.absmax"]
    with pytest.raises(InputError, match=r"the tensor w\.absmax is missing in .*" + tmp_path.name):
        assemble("w", state, tmp_path)
