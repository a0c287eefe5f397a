"""Loading: safetensors single and sharded, GGUF, quantized as they are read; what is wrong is named."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GgufConfig

from jindo_core import loader
from jindo_core.errors import InputError
from jindo_core.formats.checksums import checksums
from jindo_core.loader import load_model
from jindo_core.nf4 import NF4Linear, quantize_nf4


@pytest.fixture
def copy(stories260k, tmp_path):
    """A checkpoint that a test may break, and its tensors."""
    folder = tmp_path / "model"
    shutil.copytree(stories260k, folder)
    for path in [folder, *folder.iterdir()]:
        path.chmod(0o755)
    return folder, load_file(folder / "model.safetensors")


def shard(folder, tensors, count=3):
    names = sorted(tensors)
    weight_map = {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        held = {name: tensors[name] for name in names[i::count]}
        save_file(held, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    (folder / "model.safetensors").unlink()
    write_index(folder, weight_map)
    return weight_map


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def refused(folder, message):
    with pytest.raises(InputError, match=message) as caught:
        load_model(folder, dtype="fp32", device="cpu")
    assert "\n" not in str(caught.value)


def test_gguf_equals_transformers(smollm2_gguf):
    """q and k are stored permuted: text survives a mistake there, logits do not."""
    theirs = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent,
        gguf_file=smollm2_gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    ours = load_model(smollm2_gguf, quantize=None, dtype="fp32", device="cpu")
    ids = torch.randint(0, 49152, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0)


def test_quantized_while_read(copy):
    folder, tensors = copy
    model = load_model(folder, dtype="fp32", device="cpu")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, NF4Linear)}
    assert len(linears) == 5 * 7
    for name, linear in linears.items():
        expected = quantize_nf4(tensors[f"{name}.weight"])
        assert torch.equal(linear.nf4.packed, expected.packed)
        assert torch.equal(linear.nf4.absmax, expected.absmax)
    assert torch.equal(model.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(p.requires_grad for p in model.parameters())


def test_shards_equal_one_file(copy):
    folder, tensors = copy
    ids = torch.arange(10)[None]
    whole = load_model(folder, dtype="fp32", device="cpu")(ids).logits
    shard(folder, tensors)
    assert torch.equal(load_model(folder, dtype="fp32", device="cpu")(ids).logits, whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_dtype_on_disk(copy, dtype):
    folder, tensors = copy
    save_file({k: v.to(dtype) for k, v in tensors.items()}, folder / "model.safetensors")
    model = load_model(folder, dtype="fp32", device="cpu")
    assert model.dtype == torch.float32
    expected = quantize_nf4(tensors["model.layers.0.mlp.up_proj.weight"].to(dtype))
    assert torch.equal(model.model.layers[0].mlp.up_proj.nf4.packed, expected.packed)


def test_leftovers_of_old_checkpoints_are_let_pass(copy):
    folder, tensors = copy
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    load_model(folder, dtype="fp32", device="cpu")


def alive():
    """Bytes of all tensors' storages that exist now."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter) and t.device.type == "cpu"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_peak_is_the_quantized_model_and_one_tensor(smollm2_gguf, monkeypatch):
    """Storages alive while loading: never more than the result and two copies of the largest linear."""
    original, seen, before = loader.quantize_nf4, [], alive()

    def watch(value, **options):
        weight = original(value, **options)
        # Every 20th and the last of 210: walking all objects takes a while.
        seen.append(alive() if len(seen) % 20 == 0 or len(seen) == 209 else 0)
        return weight

    monkeypatch.setattr(loader, "quantize_nf4", watch)
    model = load_model(smollm2_gguf, dtype="bf16", device="cpu")
    held = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert len(seen) == 210
    assert seen[-1] - before > 0.9 * held
    assert max(seen) - before <= held + 2 * 1536 * 576 * 4


@pytest.mark.parametrize("kind", ["safetensors", "bin", "nf4"])
def test_peak_of_the_other_formats(stories15m, tmp_path, monkeypatch, kind):
    """The result and one tensor, the largest; what is read ahead included. That is the embedding: 37 MB of 55."""
    tensors = load_file(stories15m / "model.safetensors")
    shutil.copy(stories15m / "config.json", tmp_path)
    if kind == "bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    elif kind == "nf4":
        for name in [name for name in tensors if "_proj." in name]:
            parts = quantize_nf4(tensors.pop(name)).state_dict(name)
            tensors |= {key: part.clone() for key, part in parts.items()}
        save_file(tensors, tmp_path / "model.safetensors", metadata=checksums(tensors))
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    largest = max(value.nbytes for value in tensors.values())
    tensors.clear()
    put, seen, before = loader._Fill._place, [], alive()

    def watch(self, name, value):
        put(self, name, value)
        seen.append(alive() if len(seen) in (1, 55) else 0)  # walking all objects takes a while

    monkeypatch.setattr(loader._Fill, "_place", watch)
    model = load_model(tmp_path, dtype="bf16", device="cpu")
    held = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert len(seen) == 6 * 9 + 2
    assert 0.5 * held < max(seen) - before <= held + largest


def test_missing_extra_misshapen_and_wrongly_typed_tensors_are_named(copy):
    folder, tensors = copy
    name = "model.layers.2.mlp.up_proj.weight"
    file = folder / "model.safetensors"
    save_file({k: v for k, v in tensors.items() if k != name}, file)
    refused(folder, f"the tensor {name} is missing")
    save_file(tensors | {"model.layers.9.odd": torch.ones(2)}, file)
    refused(folder, r"the tensor model\.layers\.9\.odd belongs to no part")
    save_file(tensors | {name: tensors[name].t().contiguous()}, file)
    refused(folder, rf"the tensor {name} has shape \(64, 172\), expected \(172, 64\)")
    save_file(tensors | {name: tensors[name].to(torch.int8)}, file)
    refused(folder, f"the tensor {name} in .* is of type int8, expected")


def test_shards_that_lie_are_refused(copy):
    folder, tensors = copy
    weight_map = shard(folder, tensors)
    name = sorted(weight_map)[0]
    for place in ("../elsewhere.safetensors", "/etc/passwd", "..", "a/b.safetensors", "a\\b.safetensors", "", 3):
        write_index(folder, weight_map | {name: place})
        refused(folder, "expected the name of a file beside it")
    write_index(folder, weight_map | {name: "model-00009-of-00003.safetensors"})
    refused(folder, "is missing: download")
    write_index(folder, weight_map | {"model.odd": weight_map[name]})
    refused(folder, r"lacks the tensor model\.odd")
    write_index(folder, {k: v for k, v in weight_map.items() if k != name})
    refused(folder, f"holds, beyond what the index says, the tensor {name}")
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, "has no weight_map")


def test_broken_files_are_refused(copy, tmp_path, smollm2_gguf):
    folder, _ = copy
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for broken in (whole[:-100], whole[:5], b"", b"\xff" * 100, whole + b"more"):
        file.write_bytes(broken)
        refused(folder, "truncated or corrupt")
    file.unlink()
    refused(folder, "holds neither model.safetensors nor")
    (folder / "config.json").write_text("{")
    refused(folder, "not valid JSON")
    (folder / "config.json").unlink()
    refused(folder, r"config\.json is missing")
    refused(tmp_path / "nowhere", "does not exist: expected a folder, a .gguf file or a Hub id")
    refused(tmp_path / "nowhere.gguf", "does not exist")
    cut = tmp_path / "cut.gguf"
    for size in (0, 3, 100, 100_000, 5_000_000):
        with open(smollm2_gguf, "rb") as source:
            cut.write_bytes(source.read(size))
        refused(cut, "truncated or no GGUF file")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("quantize", ["nf4", None])
def test_weights_that_are_not_finite_are_named(copy, value, quantize):
    folder, tensors = copy
    for name in ("model.embed_tokens.weight", "model.layers.4.self_attn.k_proj.weight", "model.norm.weight"):
        damaged = tensors[name].clone()
        damaged.view(-1)[-1] = value
        save_file(tensors | {name: damaged}, folder / "model.safetensors")
        with pytest.raises(InputError, match=f"the tensor {name} has values that are NaN or infinite"):
            load_model(folder, quantize=quantize, dtype="fp32", device="cpu")


@pytest.mark.parametrize(("dtype", "value", "short"), [(torch.float64, 1e300, "fp32"), (torch.float32, 1e6, "fp16")])
def test_weights_that_do_not_fit_the_dtype_are_named(copy, dtype, value, short):
    """They are finite as they are read, and infinite in what the model is to have."""
    folder, tensors = copy
    linear, norm = "model.layers.4.self_attn.k_proj.weight", "model.norm.weight"
    for name in ("model.embed_tokens.weight", norm, linear):
        damaged = tensors[name].to(dtype, copy=True)
        damaged.view(-1)[-1] = value
        save_file(tensors | {name: damaged}, folder / "model.safetensors")
        for options in ({"quantize": None}, {}, {"double_quant": False}):
            if short == "fp16" and name == linear and options.get("quantize", "nf4"):
                continue  # NF4's scales are fp32 whatever the activations are
            with pytest.raises(InputError, match=f"the tensor {name} has values too large for {short}: give --dtype"):
                load_model(folder, dtype=short, device="cpu", **options)
    sound = tensors | {norm: tensors[norm].to(dtype)}
    save_file(sound, folder / "model.safetensors")
    assert torch.equal(load_model(folder, dtype="fp32", device="cpu").model.norm.weight, tensors[norm])


def test_a_number_of_layers_is_believed_only_where_they_are(copy, monkeypatch):
    """Before one module of them is made."""
    folder, tensors = copy
    monkeypatch.setattr(loader, "build", lambda _: pytest.fail("built"))
    config = json.loads((folder / "config.json").read_text())
    for count, message in (
        (10**9, "num_hidden_layers = 1000000000, expected at most 65536"),
        (60_000, r"the tensor model\.layers\.5\.\* is missing, of 60000 layers"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": count}))
        refused(folder, message)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v for k, v in tensors.items() if ".layers.3." not in k}, folder / "model.safetensors")
    refused(folder, r"the tensor model\.layers\.3\.\* is missing, of 5 layers")


def test_one_tensor_is_read_ahead_where_there_is_room(copy, monkeypatch):
    """While a tensor is worked on the next one is read, unless both would take more than the largest."""
    folder, tensors = copy
    checkpoint = loader.open_checkpoint(folder)
    largest = max(value.nbytes for value in tensors.values())
    original, put = type(checkpoint).read, loader._Fill._place
    read, placed, ahead, names = [], [], [], []

    def watched(self, name):
        read.append(name)
        return original(self, name)

    def place(self, name, value):
        if not placed:
            names.extend(other for other, _ in self.model.named_parameters())
        placed.append(name)
        following = names[len(placed) : len(placed) + 1]
        room = all(tensors[name].nbytes + tensors[other].nbytes <= largest for other in following)
        patience = time.monotonic() + 5
        while following and room and len(read) == len(placed) and time.monotonic() < patience:
            time.sleep(0.001)
        assert read == placed + (following if room else [])
        ahead.append(len(read) - len(placed))
        return put(self, name, value)

    monkeypatch.setattr(type(checkpoint), "read", watched)
    monkeypatch.setattr(loader._Fill, "_place", place)
    load_model(folder, dtype="fp32", device="cpu")
    assert placed == names
    assert set(names) == set(tensors)
    assert ahead[0] == 0  # the embedding is the largest
    assert sum(ahead) > 0.8 * len(tensors)


def test_progress_goes_up_to_the_bytes_of_the_files(copy):
    folder, tensors = copy
    seen = []
    load_model(folder, dtype="fp32", device="cpu", on_progress=lambda done, whole: seen.append((done, whole)))
    size = (folder / "model.safetensors").stat().st_size
    assert len(seen) == len(tensors)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (size, size)
    assert {whole for _, whole in seen} == {size}


def test_a_fault_in_the_last_tensor_leaves_nothing_behind(copy):
    """Not a tensor of it, and not the reading thread."""
    folder, tensors = copy
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    del tensors
    before, threads = alive(), threading.active_count()
    refused(folder, "NaN")
    assert alive() == before
    assert threading.active_count() == threads


def test_a_hub_id_that_can_not_be_had_says_what_to_fetch(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("decapoda-research/llama-7b-hf", "hf download decapoda-research/llama-7b-hf")


def test_settings_that_can_not_be(stories260k):
    for options, message in (
        ({"quantize": "int3"}, "quantize is 'int3', expected 'nf4' or None"),
        ({"device": "tpu9x"}, "device is 'tpu9x', expected auto, cpu, cuda"),
        ({"device": "cuda:7"}, "torch sees 0 CUDA devices"),
        ({"dtype": "int8"}, "dtype is 'int8', expected auto"),
        ({"dtype": torch.int8}, r"dtype is torch\.int8, expected auto"),
        ({"dtype": torch.float64}, r"dtype is torch\.float64, expected auto, bf16, fp32, fp16"),
        ({"dtype": None}, "dtype is None, expected auto"),
        ({"dtype": ["bf16"]}, r"dtype is \['bf16'\], expected auto"),
        ({"device": "meta"}, "device is 'meta', expected auto, cpu, cuda or cuda:N"),
        ({"device": "mps"}, "device is 'mps', expected auto, cpu, cuda or cuda:N"),
        ({"device": torch.device("xpu")}, "device is 'xpu', expected auto, cpu, cuda or cuda:N"),
        ({"device": 0}, "device is '0', expected auto, cpu, cuda or cuda:N"),
        ({"device": None}, "device is 'None', expected auto, cpu, cuda or cuda:N"),
        ({"offload_layers": "2"}, "offload_layers is '2', expected a whole number"),
        ({"offload_layers": True}, "offload_layers is True, expected a whole number"),
        ({"offload_layers": 6}, "offload_layers is 6, expected 0 to 5"),
        ({"offload_layers": 1, "quantize": None}, "offload_layers needs quantize 'nf4'"),
        ({"offload_head": "no"}, "offload_head is 'no', expected True or False"),
        ({"offload_embedding": 1}, "offload_embedding is 1, expected True or False"),
        ({"double_quant": "yes"}, "double_quant is 'yes', expected True or False"),
        ({"offload_folder": 3}, "offload_folder is 3, expected 'host' or a folder"),
    ):
        with pytest.raises(InputError, match=message):
            load_model(stories260k, **options)
