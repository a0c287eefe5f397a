"""GGUF as transformers and our reader read it, and tokenizers as llama.cpp keeps them."""

from __future__ import annotations

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from jindo_core.errors import InputError
from jindo_core.formats import open_checkpoint
from jindo_core.formats.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, tokenizer_fields
from jindo_core.formats.gguf_writer import model_fields, rope_factors, stored_tensors, verify_gguf, write_gguf
from jindo_core.model import LlamaConfig
from jindo_core.rotary import rope_frequencies

CONFIG = LlamaConfig(
    vocab_size=32, hidden_size=64, intermediate_size=172, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5,
)  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def tensors(config=CONFIG):
    generator = torch.Generator().manual_seed(0)
    width, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "model.layers.0.self_attn.q_proj.weight": (width, config.hidden_size),
        "model.layers.0.self_attn.k_proj.weight": (kv, config.hidden_size),
        "model.layers.0.mlp.down_proj.weight": (config.hidden_size, config.intermediate_size),
        "model.norm.weight": (config.hidden_size,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(file, dtype, config=CONFIG, values=None):
    values = tensors(config) if values is None else values
    fields = model_fields(config, "a name", dtype)
    stored = stored_tensors({name: tuple(value.shape) for name, value in values.items()}, dtype)
    digests = write_gguf(file, fields, config, stored, values.__getitem__)
    return fields, digests, values


@pytest.mark.parametrize(("dtype", "error"), [("f32", 0.0), ("f16", 4e-4), ("bf16", 4e-3), ("q8_0", 4e-3)])
def test_what_is_written_is_read(tmp_path, dtype, error):
    file = tmp_path / "m.gguf"
    fields, digests, values = write(file, dtype)
    verify_gguf(file, fields, digests)
    reader = gguf.GGUFReader(file)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["output_norm.weight"] == "F32"
    assert kinds["token_embd.weight"] == dtype.upper()
    # 172 is no multiple of q8_0's block of 32
    assert kinds["blk.0.ffn_down.weight"] == ("F16" if dtype == "q8_0" else dtype.upper())
    checkpoint = open_checkpoint(file)
    for name, value in values.items():
        found = checkpoint.read(name)
        assert (found - value).abs().max() <= error * value.abs().max()
    for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"):
        assert getattr(checkpoint.config, name) == getattr(CONFIG, name)
    assert checkpoint.config.rms_norm_eps == pytest.approx(1e-5)
    q = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.attn_q.weight")
    if dtype == "f32":  # llama.cpp's order: rows 0 and D/2 of a head are neighbours
        assert np.array_equal(q.data[1], values["model.layers.0.self_attn.q_proj.weight"][8].numpy())


def test_q8_0_is_ggmls(tmp_path):
    """A block: fp16 scale max|x| / 127, then 32 rounded numbers."""
    values = {"model.embed_tokens.weight": torch.linspace(-3, 3, 32 * 64).view(32, 64)}
    write(tmp_path / "m.gguf", "q8_0", values=values)
    (tensor,) = gguf.GGUFReader(tmp_path / "m.gguf").tensors
    block = tensor.data.reshape(-1, 34)[0]
    scale = np.abs(values["model.embed_tokens.weight"].numpy().ravel()[:32]).max() / np.float32(127)
    assert block[:2].view(np.float16)[0] == np.float16(scale)
    assert block[2:].view(np.int8)[0] == -127


def test_llama3_scaling_travels_as_divisors(tmp_path):
    config = LlamaConfig(**vars(CONFIG) | {"rope": LLAMA3, "max_position_embeddings": 131072, "rope_theta": 500000.0})
    fields, digests, _ = write(tmp_path / "m.gguf", "f16", config)
    verify_gguf(tmp_path / "m.gguf", fields, digests)
    read = open_checkpoint(tmp_path / "m.gguf").config
    expected, _ = rope_frequencies(config, 100)
    torch.testing.assert_close(rope_frequencies(read, 100)[0], expected, rtol=1e-6, atol=0)
    assert rope_factors(config).max() == pytest.approx(8.0)
    assert rope_factors(CONFIG) is None


def test_other_scalings(tmp_path):
    def fields(rope):
        return model_fields(LlamaConfig(**vars(CONFIG) | {"rope": rope}), "x", "f16")

    assert fields({"rope_type": "linear", "factor": 2.0})["llama.rope.scaling.factor"] == 2.0
    yarn = fields({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024})
    assert yarn["llama.rope.scaling.original_context_length"] == 1024
    with pytest.raises(InputError, match="'dynamic' has no place in GGUF"):
        fields({"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(InputError, match=r"yarn settings .*attention_factor"):
        fields({"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5})


def test_values_that_do_not_fit_and_bytes_that_differ(tmp_path):
    values = tensors()
    values["model.embed_tokens.weight"][3, 5] = 1e5
    with pytest.raises(InputError, match=r"model.embed_tokens.weight does not fit f16: give --dtype bf16 or f32"):
        write(tmp_path / "m.gguf", "f16", values=values)
    fields, digests, _ = write(tmp_path / "m.gguf", "f32")
    content = bytearray((tmp_path / "m.gguf").read_bytes())
    content[-500] ^= 4
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(InputError, match="is damaged"):
        verify_gguf(tmp_path / "m.gguf", fields, digests)
    with pytest.raises(InputError, match=r"differs in the entry general.name"):
        verify_gguf(tmp_path / "m.gguf", fields | {"general.name": "another"}, digests)


# --- tokenizers ---------------------------------------------------------------------------------------------


def test_sentencepiece_piece_by_piece(stories260k):
    """The oracle is the sentencepiece package."""
    fields, notes = tokenizer_fields(stories260k, 512)
    assert len(notes) == 1
    assert "makes one space of several" in notes[0]
    processor = SentencePieceProcessor(model_file=str(stories260k / "tokenizer.model"))
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.tokens"] == [processor.id_to_piece(i) for i in range(512)]
    assert fields["tokenizer.ggml.scores"] == [processor.get_score(i) for i in range(512)]
    for i, kind in enumerate(fields["tokenizer.ggml.token_type"]):
        assert (kind == CONTROL) == processor.is_control(i)
        assert (kind == UNKNOWN) == processor.is_unknown(i)
        assert (kind == BYTE) == processor.is_byte(i)
    assert [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "unknown")] == [1, 2, 0]
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.add_space_prefix"] is True


@pytest.mark.parametrize("name", ["llama-32000", "mistral-v1-32000"])
def test_real_sentencepiece_models(assets, tmp_path, name):
    source = next(path for path in (assets / "tokenizers").rglob("*") if name in str(path) and path.is_file())
    shutil.copyfile(source, tmp_path / "tokenizer.model")
    processor = SentencePieceProcessor(model_file=str(source))
    fields, notes = tokenizer_fields(tmp_path, 32003)
    assert notes == ()
    assert fields["tokenizer.ggml.scores"][:32000] == [processor.get_score(i) for i in range(32000)]
    assert fields["tokenizer.ggml.tokens"][32000:] == ["[PAD32000]", "[PAD32001]", "[PAD32002]"]
    assert fields["tokenizer.ggml.token_type"][32000:] == [UNUSED] * 3
    with pytest.raises(InputError, match="the tokenizer has 32000 tokens"):
        tokenizer_fields(tmp_path, 31999)


def test_added_tokens_and_a_chat_template(stories260k, tmp_path):
    for file in stories260k.glob("token*"):
        shutil.copyfile(file, tmp_path / file.name)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 513}))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    decoder = {"513": {"content": "<|im_end|>", "special": True}, "514": {"content": "word", "special": False}}
    more = {"added_tokens_decoder": decoder, "chat_template": "{{ x }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | more))
    fields, _ = tokenizer_fields(tmp_path, 516)
    assert fields["tokenizer.ggml.tokens"][512:] == ["[PAD512]", "<|im_end|>", "word", "[PAD515]"]
    assert fields["tokenizer.ggml.token_type"][512:] == [UNUSED, CONTROL, USER_DEFINED, UNUSED]
    assert len(fields["tokenizer.ggml.scores"]) == 516
    assert fields["tokenizer.chat_template"] == "{{ x }}"


def test_a_damaged_or_unigram_model(stories260k, tmp_path):
    whole = (stories260k / "tokenizer.model").read_bytes()
    from jindo_core.formats.gguf_tokenizer import _from_sentencepiece

    (tmp_path / "tokenizer.model").write_bytes(whole[:-9])
    with pytest.raises(InputError, match="is no whole SentencePiece model"):
        _from_sentencepiece(tmp_path)
    # trainer_spec (field 2): model_type (field 3) 1, unigram
    (tmp_path / "tokenizer.model").write_bytes(whole + bytes([0x12, 2, 0x18, 1]))
    with pytest.raises(InputError, match=r"kind 1, expected its BPE"):
        _from_sentencepiece(tmp_path)


def tokenizer_json(folder, splitter, **model):
    vocabulary = {text: i for i, text in enumerate(["<unk>", "<s>", "a", "b", "ab", "<0x0A>", "▁"])}
    raw = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "decoder": None, "pre_tokenizer": splitter,
        "added_tokens": [
            {"id": i, "content": text, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False}
            for i, text in enumerate(["<unk>", "<s>"])
        ],
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"]], "unk_token": "<unk>"} | model,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "unk_token": "<unk>"}))


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    ("splitter", "name"),
    [
        (BYTES, "gpt-2"),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]}, "smollm"),
        (BYTES | {"add_prefix_space": True}, None),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False}, BYTES]}, None),
        ({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}, None),
    ],
)
def test_how_text_is_split_has_a_name_or_is_refused(tmp_path, splitter, name):
    tokenizer_json(tmp_path, splitter)
    if name is None:
        with pytest.raises(InputError, match=r"llama.cpp would cut text into other tokens"):
            tokenizer_fields(tmp_path, 7)
        return
    fields, _ = tokenizer_fields(tmp_path, 8)
    assert fields["tokenizer.ggml.pre"] == name
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.merges"] == ["a b"]
    assert fields["tokenizer.ggml.token_type"] == [CONTROL, CONTROL, *[NORMAL] * 5, UNUSED]


@pytest.mark.parametrize(("digits", "name"), [(r"\p{N}{1,3}", "llama-bpe"), (r"\p{N}", "qwen2")])
def test_llama_3s_and_qwen2s_rules(tmp_path, digits, name):
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    tokenizer_json(tmp_path, {"type": "Sequence", "pretokenizers": [split, BYTES | {"use_regex": False}]})
    assert tokenizer_fields(tmp_path, 7)[0]["tokenizer.ggml.pre"] == name
    Tokenizer.from_file(str(tmp_path / "tokenizer.json"))  # it is one


def test_a_tokenizer_json_that_was_sentencepiece(tmp_path):
    tokenizer_json(tmp_path, None, byte_fallback=True)
    fields, _ = tokenizer_fields(tmp_path, 7)
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.token_type"] == [UNKNOWN, CONTROL, NORMAL, NORMAL, NORMAL, BYTE, NORMAL]
    assert fields["tokenizer.ggml.scores"][4] > fields["tokenizer.ggml.scores"][2]  # merges first
    assert "tokenizer.ggml.merges" not in fields


def test_a_ggufs_own_tokenizer_is_copied(tmp_path):
    tokenizer_json(tmp_path, BYTES)
    file, (fields, _) = tmp_path / "m.gguf", tokenizer_fields(tmp_path, 32)
    values = tensors()
    stored = stored_tensors({name: tuple(value.shape) for name, value in values.items()}, "f16")
    write_gguf(file, model_fields(CONFIG, "x", "f16") | fields, CONFIG, stored, values.__getitem__)
    assert tokenizer_fields(file, 32) == (fields, ())
