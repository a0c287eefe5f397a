"""Meta's layout, written here from a trained model in one, two and more ranks: bit for bit the model it came from."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from jindo_core.errors import InputError
from jindo_core.formats import open_checkpoint
from jindo_core.formats.names import rename, rows_to_pairs
from jindo_core.loader import load_model
from jindo_core.tokenizer import load_tokenizer

STORIES15M = {"dim": 288, "multiple_of": 32, "n_heads": 6, "n_layers": 6, "norm_eps": 1e-5, "vocab_size": -1}
STORIES260K = {"dim": 64, "n_heads": 8, "n_kv_heads": 4, "n_layers": 5, "norm_eps": 1e-5, "vocab_size": 512}


def write(folder, tensors, params, ranks, *, embedding_dim=1):
    """`tensors` under Hugging Face's names -> params.json and consolidated.NN.pth."""
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    heads = {"q": params["n_heads"], "k": params.get("n_kv_heads", params["n_heads"])}
    held = [{} for _ in range(ranks)]
    for name, value in tensors.items():
        theirs = rename(name, "huggingface", "meta")
        for kind, count in heads.items():
            if f".{kind}_proj." in name:
                value = rows_to_pairs(value, count)
        dim = 1 if theirs.endswith(("wo.weight", "w2.weight")) else 0
        dim = embedding_dim if theirs == "tok_embeddings.weight" else dim
        parts = [value] * ranks if value.dim() == 1 else value.chunk(ranks, dim)
        for rank, part in zip(held, parts, strict=True):
            rank[theirs] = part.clone()
    for number, rank in enumerate(held):
        rank |= dict.fromkeys(("rope.freqs", "layers.0.attention.inner_attention.rope.freqs"), torch.ones(4))
        torch.save(rank, folder / f"consolidated.{number:02d}.pth")


def untied(folder, rows=None):
    """A checkpoint's tensors with a head of its own, as Meta writes it; of the vocabulary, the first `rows`."""
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = tensors[name][:rows].contiguous()
    return tensors


@pytest.mark.parametrize(("ranks", "embedding_dim"), [(1, 1), (2, 1), (2, 0), (3, 1)])
def test_stories15m_equals_transformers(stories15m, tmp_path, ids, ranks, embedding_dim):
    tensors = untied(stories15m, 31_998)  # 3 ranks share it
    write(tmp_path, tensors, STORIES15M, ranks, embedding_dim=embedding_dim)
    opened = open_checkpoint(tmp_path)
    for name, value in tensors.items():
        assert torch.equal(opened.read(name), value), name
    assert opened.shapes == {name: tuple(value.shape) for name, value in tensors.items()}
    ours = load_model(tmp_path, quantize=None, dtype="fp32", device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(stories15m, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits[..., :31_998], atol=1e-4, rtol=0)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_grouped_heads(stories260k, tmp_path, ranks, ids):
    """8 query and 4 key/value heads, on up to 4 ranks: the same bits in NF4 too."""
    tensors = untied(stories260k)
    write(tmp_path, tensors, STORIES260K, ranks)
    opened = open_checkpoint(tmp_path)
    assert all(torch.equal(opened.read(name), value) for name, value in tensors.items())
    assert opened.config.intermediate_size == 172
    whole = load_model(stories260k, dtype="fp32", device="cpu")
    assert torch.equal(load_model(tmp_path, dtype="fp32", device="cpu")(ids).logits, whole(ids).logits)


def test_a_head_that_is_not_there_is_tied(stories260k, tmp_path, ids):
    tensors = load_file(stories260k / "model.safetensors")
    write(tmp_path, {name: value.bfloat16() for name, value in tensors.items()}, STORIES260K, 2)
    model = load_model(tmp_path, dtype="fp32", device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("changes", "context", "theta", "rope"),
    [
        ({"norm_eps": 1e-6}, 2048, 10000.0, None),
        ({}, 4096, 10000.0, None),
        ({"rope_theta": 1e6}, 16384, 1e6, None),
        ({"rope_theta": 500000.0, "use_scaled_rope": True}, 131072, 500000.0, 8.0),
        ({"rope_theta": 500000.0, "use_scaled_rope": True, "rope_scaling_factor": 32.0}, 131072, 500000.0, 32.0),
        ({"use_scaled_rope": False}, 4096, 10000.0, None),
    ],
)
def test_params_of_the_generations(stories260k, tmp_path, changes, context, theta, rope):
    write(tmp_path, untied(stories260k), STORIES260K | changes, 1)
    config = open_checkpoint(tmp_path).config
    assert (config.max_position_embeddings, config.rope_theta) == (context, theta)
    assert (config.vocab_size, config.num_key_value_heads, config.head_dim) == (512, 4, 8)
    if rope is None:
        assert config.rope is None
    else:
        assert config.rope == {
            "rope_type": "llama3", "factor": rope, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }  # fmt: skip


@pytest.mark.parametrize(("dim", "factor"), [(2048, 32.0), (3072, 32.0), (4096, 8.0), (8192, 8.0)])
def test_the_small_models_of_3_2_scale_further(tmp_path, dim, factor):
    """Their params.json does not say so; Hugging Face's conversions of them do."""
    tensors = {
        "tok_embeddings.weight": torch.zeros(8, dim), "layers.0.attention.wq.weight": torch.zeros(dim, 4),
        "layers.0.feed_forward.w1.weight": torch.zeros(4, 4),
    }  # fmt: skip
    torch.save(tensors, tmp_path / "consolidated.00.pth")
    params = {"dim": dim, "n_heads": dim // 64, "n_kv_heads": 8, "n_layers": 1, "use_scaled_rope": True}
    (tmp_path / "params.json").write_text(json.dumps(params))
    assert open_checkpoint(tmp_path).config.rope["factor"] == factor


@pytest.mark.parametrize("parent", [False, True])
def test_the_tokenizer_beside_it(stories260k, tmp_path, parent):
    """Beside the weights, or one folder up, where LLaMA 1 has it."""
    folder = tmp_path / "7B"
    write(folder, untied(stories260k), STORIES260K, 1)
    shutil.copy(stories260k / "tokenizer.model", tmp_path if parent else folder)
    expected = load_tokenizer(stories260k)
    assert load_tokenizer(folder).encode("Once upon a time") == expected.encode("Once upon a time")


def test_the_tokenizer_of_llama_3_is_told(stories260k, tmp_path):
    write(tmp_path, untied(stories260k), STORIES260K, 1)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    with pytest.raises(InputError, match=r"tiktoken vocabulary .LLaMA 3.*tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_what_does_not_fit_is_refused(stories260k, tmp_path, refused):
    tensors = untied(stories260k)

    def changed(rank, change):
        write(tmp_path, tensors, STORIES260K, 2)
        file = tmp_path / f"consolidated.{rank:02d}.pth"
        held = torch.load(file, weights_only=True)
        change(held)
        torch.save(held, file)

    changed(1, lambda held: held.pop("norm.weight"))
    refused(tmp_path, r"consolidated\.01\.pth lacks the tensor norm\.weight")
    changed(1, lambda held: held["norm.weight"].mul_(2))
    refused(tmp_path, r"the tensor model\.norm\.weight differs between .* and consolidated\.01\.pth")
    changed(1, lambda held: held.update({"layers.0.attention.wq.weight": torch.ones(16, 64)}))
    refused(tmp_path, r"wq\.weight is .* in .*01\.pth, but .* in consolidated\.00\.pth")
    changed(0, lambda held: held.update({"norm.weight": torch.ones(64, dtype=torch.int32)}))
    refused(tmp_path, r"norm\.weight in .* is of type torch\.int32|norm\.weight is torch\.float32 .* but torch\.int32")
    changed(0, lambda held: held.update({"layers.9.odd.weight": torch.ones(1)}))
    refused(tmp_path, r"01\.pth lacks the tensor layers\.9\.odd\.weight")
    write(tmp_path, tensors | {"model.norm.weight": tensors["model.norm.weight"] * float("nan")}, STORIES260K, 2)
    refused(tmp_path, r"the tensor model\.norm\.weight has values that are NaN")
    write(tmp_path, tensors, STORIES260K, 2)
    (tmp_path / "consolidated.01.pth").unlink()
    refused(tmp_path, "holds 1 consolidated files, in which wq has 32 rows together, expected 64: one is missing")
    write(tmp_path, tensors, STORIES260K, 2)
    (tmp_path / "consolidated.00.pth").unlink()
    refused(tmp_path, r"consolidated\.00\.pth is missing: download")
    write(tmp_path, tensors, STORIES260K | {"dim": "64"}, 2)
    refused(tmp_path, "has dim = '64', expected a positive whole number")
    write(tmp_path, tensors, STORIES260K | {"n_layers": 6}, 2)
    refused(tmp_path, r"the tensor model\.layers\.5\..* is missing")
    for changes, message in (
        ({"n_layers": 10**9}, "n_layers = 1000000000, expected at most 65536"),
        ({"norm_eps": float("nan")}, "norm_eps = nan, expected a positive number"),
        ({"rope_theta": "x"}, "rope_theta = 'x', expected a positive number"),
        ({"n_kv_heads": 3}, "8 heads and 3 key/value heads"),
        ({"use_scaled_rope": "yes"}, "use_scaled_rope = 'yes', expected true or false"),
        ({"use_scaled_rope": True, "rope_scaling_factor": 0}, "rope_scaling_factor = 0, expected a positive number"),
    ):
        (tmp_path / "params.json").write_text(json.dumps(STORIES260K | changes))
        refused(tmp_path, r"params\.json has " + message)


def test_a_folder_without_its_params_is_told_apart(tmp_path):
    (tmp_path / "consolidated.00.pth").write_bytes(b"")
    with pytest.raises(InputError, match=r"consolidated\.00\.pth but no params\.json: copy it there"):
        open_checkpoint(tmp_path)
