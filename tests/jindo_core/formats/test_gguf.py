"""GGUF: many kinds of tensors in one file, read as the gguf package and transformers read them."""

from __future__ import annotations

import dataclasses

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM, GgufConfig

from jindo_core.formats import gguf as reader
from jindo_core.formats import open_checkpoint
from jindo_core.formats.names import rename, rows_to_halves, rows_to_pairs
from jindo_core.loader import load_model
from jindo_core.model import LlamaConfig, LlamaForCausalLM

CONFIG = LlamaConfig(96, 256, 512, 2, 4, 2, 64, max_position_embeddings=128, rms_norm_eps=1e-5)
MADE = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1)
"""Kinds that the package also writes."""
READ_ONLY = (Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_NL, Kind.IQ4_XS)


def weights_of(layers):
    torch.manual_seed(0)
    model = LlamaForCausalLM(dataclasses.replace(CONFIG, num_hidden_layers=layers))
    return {name: value.detach() * (0.3 if value.dim() > 1 else 1.0) for name, value in model.named_parameters()}


def weights():
    return weights_of(CONFIG.num_hidden_layers)


def write(file, tensors, kinds):
    """A LLaMA's tensors under Hugging Face's names; matrices of the layers take `kinds` in turn."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_vocab_size(CONFIG.vocab_size)
    turn = 0
    for name, value in tensors.items():
        kind = Kind.F32
        if value.dim() > 1:
            kind, turn = kinds[turn % len(kinds)], turn + 1
        for part, heads in ((".q_proj.", CONFIG.num_attention_heads), (".k_proj.", CONFIG.num_key_value_heads)):
            value = rows_to_pairs(value, heads) if part in name else value
        data = gguf.quantize(value.numpy(), kind) if kind in MADE else random_blocks(value.shape, kind)
        writer.add_tensor(rename(name, "huggingface", "gguf") or name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_blocks(shape, kind):
    """Bytes of a kind that the package can't make: any codes will do, with scales that are finite."""
    draw = np.random.default_rng(0)
    count, size = gguf.GGML_QUANT_SIZES[kind]
    # Bytes below 0x3c: a half-precision scale that falls on them is below one.
    return draw.integers(0, 0x3C, (shape[0], shape[1] // count * size), dtype=np.uint8)


def test_every_kind_equals_transformers(tmp_path):
    file = tmp_path / "mixed.gguf"
    write(file, weights(), MADE)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    ours = load_model(file, quantize=None, dtype="fp32", device="cpu")
    ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk", [1 << 20, 1000])
def test_chunks_equal_the_whole(tmp_path, monkeypatch, chunk):
    """Dequantized a few rows at a time; also the kinds that only llama.cpp makes."""
    monkeypatch.setattr(reader, "CHUNK", chunk)
    file = tmp_path / "mixed.gguf"
    write(file, weights(), READ_ONLY)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    opened = open_checkpoint(file)
    assert {stored[rename(name, "huggingface", "gguf")].tensor_type for name in opened.shapes} >= set(READ_ONLY)
    for name in opened.shapes:
        tensor = stored[rename(name, "huggingface", "gguf")]
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        for part, heads in ((".q_proj.", 4), (".k_proj.", 2)):
            expected = rows_to_halves(expected, heads) if part in name else expected
        assert torch.equal(opened.read(name), expected), name


def test_a_folder_of_that_name_is_told(tmp_path, refused):
    (tmp_path / "d.gguf").mkdir()
    refused(tmp_path / "d.gguf", r"d\.gguf is a folder, expected a \.gguf file")


def test_numbers_that_can_not_be_are_said_to_be_in_the_file(tmp_path, refused, monkeypatch):
    file = tmp_path / "odd.gguf"
    for change, message in (
        ({"rms_norm_eps": float("nan")}, r"odd\.gguf has rms_norm_eps = nan, expected a positive number"),
        ({"num_hidden_layers": 10**9}, r"odd\.gguf has num_hidden_layers = 1000000000, expected at most 65536"),
        ({"num_hidden_layers": 60_000}, r"the tensor model\.layers\.2\.\* is missing, of 60000 layers"),
    ):
        monkeypatch.setitem(globals(), "CONFIG", dataclasses.replace(CONFIG, **change))
        write(file, weights_of(2), [Kind.F32])
        refused(file, message)
        monkeypatch.undo()
    for factors in ([1.0] * 31, [1.0] * 31 + [0.0], [1.0] * 31 + [float("nan")]):
        write(file, weights() | {"rope_freqs.weight": torch.tensor(factors)}, [Kind.F32])
        refused(file, r"odd\.gguf has RoPE divisors that can't be, expected 32 positive numbers")


def test_its_bytes_are_the_file(tmp_path):
    file = tmp_path / "half.gguf"
    write(file, weights(), [Kind.F16])
    opened = open_checkpoint(file)
    assert opened.files == [file]
    assert opened.nbytes == file.stat().st_size
    assert opened.quantized == frozenset()
    with pytest.raises(KeyError, match="GGUF holds no NF4"):
        opened.read_nf4("model.norm.weight")
