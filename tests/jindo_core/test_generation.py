"""Greedy text token by token as transformers', sampling, stopping, streaming."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import jindo_core
from jindo_core.errors import InputError
from jindo_core.generation import _pick, generate, generate_ids
from jindo_core.loader import load_model
from jindo_core.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def story(stories15m):
    return load_model(stories15m, quantize=None, dtype="fp32", device="cpu"), load_tokenizer(stories15m)


def theirs(model, ids, count):
    out = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=None)
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", ["stories260K-hf", "stories15M-hf"])
def test_greedy_equals_transformers_for_64_tokens(assets, name):
    path = assets / "models" / name
    ours = load_model(path, quantize=None, dtype="fp32", device="cpu")
    ids = load_tokenizer(path).encode("Once upon a time")
    expected = theirs(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), ids, 64)
    assert list(generate_ids(ours, ids, max_new_tokens=64)) == expected


def test_greedy_of_smollm2_equals_transformers(smollm2_gguf):
    ours = load_model(smollm2_gguf, quantize=None, dtype="fp32", device="cpu")
    ids = load_tokenizer(smollm2_gguf).encode("The capital of France is")
    peer = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    assert list(generate_ids(ours, ids, max_new_tokens=64)) == theirs(peer, ids, 64)


def test_text_reads_and_streams(story):
    model, tokenizer = story
    pieces = []
    text = jindo_core.generate(model, tokenizer, "Once upon a time", max_new_tokens=24, on_text=pieces.append)
    assert "little girl named Lily" in text
    assert "".join(pieces) == text
    assert len(pieces) > 10
    assert not model.training


def test_quantized_text_still_tells_a_story(stories15m):
    model = load_model(stories15m, dtype="fp32", device="cpu")
    text = generate(model, load_tokenizer(stories15m), "Once upon a time, there was a", max_new_tokens=30)
    assert "little" in text


def test_stops_at_a_stop_id_and_at_the_context(story):
    model, tokenizer = story
    ids = tokenizer.encode("Once upon a time")
    free = list(generate_ids(model, ids, max_new_tokens=20))
    stop = free[7]
    assert list(generate_ids(model, ids, max_new_tokens=20, stop_ids=frozenset({stop}))) == free[: free.index(stop) + 1]
    context = model.config.max_position_embeddings
    long = (ids * context)[: context - 3]
    assert len(list(generate_ids(model, long, max_new_tokens=50))) == 3
    with pytest.raises(InputError, match=rf"{context} tokens long, the model's context {context}"):
        list(generate_ids(model, (ids * context)[:context], max_new_tokens=1))
    with pytest.raises(InputError, match="the prompt is empty"):
        list(generate_ids(model, [], max_new_tokens=1))


def test_sampling_is_seeded(story):
    model, tokenizer = story
    draw = lambda seed: generate(model, tokenizer, "Once", max_new_tokens=20, temperature=1.0, seed=seed)  # noqa: E731
    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(5)}) > 1


def test_top_k_and_top_p_keep_what_they_should():
    logits = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.1]))
    generator = torch.Generator().manual_seed(0)

    def seen(temperature=1.0, top_p=1.0, top_k=0):
        draws = [_pick(logits, temperature, top_p, top_k, generator) for _ in range(400)]
        return {token: draws.count(token) / 400 for token in set(draws)}

    everything = seen()
    assert set(everything) == {0, 1, 2, 3}
    assert everything[0] == pytest.approx(0.5, abs=0.1)
    assert set(seen(top_k=2)) == {0, 1}
    assert set(seen(top_p=0.75)) == {0, 1}
    assert set(seen(top_p=0.76)) == {0, 1, 2}
    assert set(seen(top_p=0.01)) == {0}
    assert set(seen(temperature=0.01)) == {0}
    assert _pick(logits, 0.0, 1.0, 0, None) == 0
