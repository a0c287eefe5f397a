"""Quantizing and exporting: what other programs load, round trips, and what happens when something is wrong."""

from __future__ import annotations

import gc
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GgufConfig, LlamaConfig
from transformers import LlamaForCausalLM as TheirLlama

from jindo_core import convert
from jindo_core.convert import run_export, run_quantize
from jindo_core.convert_config import ExportConfig, QuantizeConfig
from jindo_core.errors import InputError
from jindo_core.formats.safetensors_writer import SafetensorsWriter
from jindo_core.loader import load_model
from jindo_core.tokenizer import load_tokenizer

IDS = torch.randint(0, 200, (2, 24), generator=torch.Generator().manual_seed(1))
SIZES = {
    "vocab_size": 200, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def logits(path, **options):
    with torch.no_grad():
        return load_model(path, **{"quantize": None, "dtype": "fp32", "device": "cpu"} | options)(IDS).logits


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    """A random LLaMA in bf16, its head not tied, as transformers saves it."""
    folder = tmp_path_factory.mktemp("bf16")
    torch.manual_seed(0)
    TheirLlama(LlamaConfig(**SIZES, tie_word_embeddings=False)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def quantize(base, target, **options):
    return run_quantize(QuantizeConfig(base_model=str(base), output_dir=str(target), device="cpu", **options))


def export(base, format, target, **options):
    place = {"output_file" if format == "gguf" else "output_dir": str(target)}
    return run_export(ExportConfig(base_model=str(base), format=format, device="cpu", **place, **options))


# --- quantize -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["bitsandbytes", "jindo"])
@pytest.mark.parametrize("double", [True, False])
def test_transformers_loads_it_as_bitsandbytes_would_have_made_it(bf16, tmp_path, format, double):
    """Bit for bit: tensors and logits, against bitsandbytes quantizing the same model itself."""
    folder = quantize(bf16, tmp_path / "q", format=format, double_quant=double, max_shard_size="40KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(bf16, quantization_config=settings, device_map="cpu")
    ours = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    state, expected = ours.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
    # With gradients: without, on some CPUs, bitsandbytes takes a path that rounds.
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    assert ours.config.quantization_config.to_dict() == theirs.config.quantization_config.to_dict()


def test_our_reader_takes_the_bytes_as_they_are(bf16, tmp_path):
    folder = quantize(bf16, tmp_path / "q")
    assert torch.equal(logits(folder, quantize="nf4"), logits(bf16, quantize="nf4"))
    again = quantize(folder, tmp_path / "again", double_quant=False)  # no requantization, whatever is asked for
    first, second = (load_file(path / "model.safetensors") for path in (folder, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_flipped_bit_in_our_format_is_found(bf16, tmp_path):
    folder = quantize(bf16, tmp_path / "q")
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    load_file(file)  # the safetensors package sees nothing
    with pytest.raises(InputError, match="is damaged"):
        load_model(folder, dtype="fp32", device="cpu")


def test_everything_of_a_model_goes_along(stories260k, tmp_path):
    folder = quantize(stories260k, tmp_path / "q")
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (stories260k / name).read_bytes()
    config = json.loads((folder / "config.json").read_text())
    original = json.loads((stories260k / "config.json").read_text())
    assert {name: config[name] for name in original} == original
    assert load_tokenizer(folder).encode("Once") == load_tokenizer(stories260k).encode("Once")


def alive():
    """Bytes of all tensors' storages that exist now."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter) and t.device.type == "cpu"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("job", ["quantize", "export"])
def test_the_peak_is_a_few_tensors_whatever_the_model(tmp_path, monkeypatch, job):
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 12}
    TheirLlama(LlamaConfig(**sizes)).save_pretrained(tmp_path / "base")
    whole = (tmp_path / "base" / "model.safetensors").stat().st_size
    largest, before, seen = 512 * 256 * 4, alive(), []
    watch = [f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 11)]
    original = SafetensorsWriter.write

    def watched(self, name, tensor):
        original(self, name, tensor)
        if name in watch:  # walking all objects takes a while
            seen.append(alive() - before)

    monkeypatch.setattr(SafetensorsWriter, "write", watched)
    if job == "quantize":
        quantize(tmp_path / "base", tmp_path / "out")
    else:
        export(tmp_path / "base", "safetensors", tmp_path / "out", dtype="bf16")
    assert len(seen) == 2
    assert whole > 30 * largest
    assert max(seen) < 3 * largest  # the tensor, and what becomes of it


# --- export: there and back -----------------------------------------------------------------------------------


def test_meta_and_back(bf16, stories260k, tmp_path):
    for name, base in (("untied", bf16), ("tied", stories260k)):
        meta = export(base, "meta", tmp_path / name / "meta")
        assert torch.equal(logits(meta), logits(base))
        back = export(meta, "safetensors", tmp_path / name / "back")
        assert torch.equal(logits(back), logits(base))
        with torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)(IDS).logits
        torch.testing.assert_close(theirs, logits(base), atol=1e-4, rtol=0)
    raw = torch.load(tmp_path / "untied" / "meta" / "consolidated.00.pth", weights_only=True)
    q, k = (load_file(bf16 / "model.safetensors")[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qk")
    # Rows 2i and 2i + 1 of a head are Hugging Face's i and i + D/2 (D = 16).
    assert torch.equal(raw["layers.0.attention.wq.weight"][16 + 2 * 3 + 1], q[16 + 3 + 8])
    assert torch.equal(raw["layers.0.attention.wk.weight"][2 * 3], k[3])
    assert raw["layers.0.feed_forward.w3.weight"].dtype == torch.bfloat16


def test_gguf_and_back(stories260k, tmp_path):
    file = export(stories260k, "gguf", tmp_path / "m.gguf", dtype="f32")
    assert torch.equal(logits(file), logits(stories260k))
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, logits(stories260k), atol=1e-4, rtol=0)
    text = "Once upon a time, Lily saw a big dog."
    assert AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)(text).input_ids == load_tokenizer(
        stories260k
    ).encode(text)
    back = export(file, "safetensors", tmp_path / "back")
    assert torch.equal(logits(back), logits(stories260k))
    # The tokenizer came back out of the GGUF file.
    assert load_tokenizer(back).encode(text) == load_tokenizer(stories260k).encode(text)


@pytest.mark.parametrize(("dtype", "error"), [("f16", 0.02), ("bf16", 0.2), ("q8_0", 0.5)])
def test_smaller_ggufs_are_close(stories260k, tmp_path, dtype, error, capsys):
    file = export(stories260k, "gguf", tmp_path / "m.gguf", dtype=dtype)
    found, expected = logits(file), logits(stories260k)
    assert 0 < (found - expected).abs().max() < error
    said = capsys.readouterr().out
    assert ("rows that are no multiple of 32: kept in f16" in said) == (dtype == "q8_0")
    assert "read back and compared" in said


def test_shards_and_dtypes(bf16, tmp_path):
    folder = export(bf16, "safetensors", tmp_path / "s", dtype="f16", max_shard_size="50KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    original = load_file(bf16 / "model.safetensors")
    for name in files:
        for key, value in load_file(folder / name).items():
            assert torch.equal(value, original[key].half())
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float16"
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits
    torch.testing.assert_close(theirs, logits(folder), atol=1e-4, rtol=0)


def test_nf4_is_exported_as_what_it_stands_for(bf16, tmp_path):
    quantized = quantize(bf16, tmp_path / "q")
    whole = export(quantized, "safetensors", tmp_path / "whole")
    assert "quantization_config" not in json.loads((whole / "config.json").read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    found = load_file(whole / "model.safetensors")[name]
    assert found.dtype == torch.bfloat16
    expected = load_model(quantized, dtype="bf16", device="cpu").get_submodule(name.removesuffix(".weight"))
    assert torch.equal(found, expected.nf4.dequantize(torch.bfloat16))


# --- what is wrong ----------------------------------------------------------------------------------------------


def spoil(base, folder, change):
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_nan_and_overflow_are_named(bf16, tmp_path):
    name = "model.layers.1.self_attn.v_proj.weight"

    def nan(tensors):
        tensors[name][3, 4] = float("nan")

    def large(tensors):
        tensors[name][3, 4] = 1e6

    broken = spoil(bf16, tmp_path / "nan", nan)
    for job in (lambda t: quantize(broken, t), lambda t: export(broken, "safetensors", t)):
        with pytest.raises(InputError, match=f"the tensor {name} has values that are not finite"):
            job(tmp_path / "out")
    with pytest.raises(InputError, match=f"the tensor {name} does not fit f16: give --dtype bf16 or f32"):
        export(spoil(bf16, tmp_path / "large", large), "meta", tmp_path / "out", dtype="f16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "nan"]


def test_the_source_is_never_the_target(bf16, tmp_path):
    base = tmp_path / "models" / "base"
    shutil.copytree(bf16, base)
    for target in (base, base.parent, tmp_path):
        with pytest.raises(InputError, match="which is read: give another name"):
            quantize(base, target, overwrite=True)
    assert torch.equal(logits(base), logits(bf16))


def test_a_target_in_the_source_and_a_name_that_can_not_be(bf16, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bf16, base)
    before = sorted(path.name for path in base.iterdir())
    for target in (base / "sub", base / "sub" / "deeper"):
        with pytest.raises(InputError, match=r"lies in .*base, which is read: give another name"):
            quantize(base, target)
        with pytest.raises(InputError, match=r"lies in .*base, which is read: give another name"):
            export(base, "gguf", target.with_suffix(".gguf"))
    assert sorted(path.name for path in base.iterdir()) == before
    with pytest.raises(InputError, match="expected one without a null byte"):
        quantize(base, tmp_path / "a\0b")
    with pytest.raises(InputError, match="expected one without a null byte"):
        export(base, "gguf", str(tmp_path / "a\0b.gguf"))


@pytest.mark.parametrize("format", ["bitsandbytes", "jindo"])
def test_a_model_in_fp64_is_quantized_in_fp32(bf16, tmp_path, capsys, format):
    base = tmp_path / "base"
    shutil.copytree(bf16, base)
    tensors = {name: value.double() + 1e-12 for name, value in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    folder = quantize(base, tmp_path / "q", format=format)
    assert "base holds float64: it is written in float32" in capsys.readouterr().out
    held = load_file(folder / "model.safetensors")
    assert torch.float64 not in {value.dtype for value in held.values()}
    assert torch.equal(held["model.norm.weight"], tensors["model.norm.weight"].float())
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float32"
    assert torch.equal(logits(folder, quantize="nf4"), logits(base, quantize="nf4"))
    AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    save_file({k: v.float() for k, v in tensors.items()}, base / "model.safetensors", metadata={"format": "pt"})
    narrow = load_file(quantize(base, tmp_path / "narrow", format=format) / "model.safetensors")
    assert held.keys() == narrow.keys()
    assert all(torch.equal(value, narrow[name]) for name, value in held.items())
    tensors["model.norm.weight"][0] = 1e300
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"the tensor model\.norm\.weight has values that are not finite"):
        quantize(base, tmp_path / "again")


def test_a_side_file_that_can_not_be_read_is_named(bf16, tmp_path, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(bf16, base)
    (base / "merges.txt").write_text("x")
    real = convert.Path.read_bytes

    def fails(path):
        if path.name == "merges.txt" and path.parent == base:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(convert.Path, "read_bytes", fails)
    with pytest.raises(InputError, match=r"merges\.txt can't be read .Permission denied.: expected a readable file"):
        quantize(base, tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_bytes_that_did_not_arrive_are_found_before_the_old_model_goes(bf16, tmp_path, monkeypatch):
    """A disk that loses a bit between the write and the read."""
    target = quantize(bf16, tmp_path / "q")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    real = convert.sync_folder

    def faulty(folder):
        real(folder)
        for file in [*folder.glob("*.safetensors"), *folder.glob("*.pth"), *folder.glob("*.gguf")]:
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 8
            file.write_bytes(content)

    monkeypatch.setattr(convert, "sync_folder", faulty)
    for job in (
        lambda: quantize(bf16, target, overwrite=True),
        lambda: export(bf16, "safetensors", target, overwrite=True),
        lambda: export(bf16, "meta", target, overwrite=True, dtype="f32"),
    ):
        with pytest.raises(InputError, match=r"is damaged|read back"):
            job()
        assert {path.name: path.read_bytes() for path in target.iterdir()} == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["q"]


def test_ctrl_c_on_the_way(bf16, tmp_path, monkeypatch):
    target = quantize(bf16, tmp_path / "q")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    original = SafetensorsWriter.write

    def stopped(self, name, tensor):
        original(self, name, tensor)
        if len(self.written) == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(SafetensorsWriter, "write", stopped)
    with pytest.raises(KeyboardInterrupt):
        quantize(bf16, target, overwrite=True)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["q"]
