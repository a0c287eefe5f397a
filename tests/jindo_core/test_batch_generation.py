"""Prompts of unequal length together: every token as alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from jindo_core.batch_generation import Answer, generate_batch
from jindo_core.errors import InputError
from jindo_core.generation import generate_ids
from jindo_core.loader import load_model
from jindo_core.lora import adapted_layers, attach_lora
from jindo_core.model import LlamaConfig, LlamaForCausalLM
from jindo_core.tokenizer import load_tokenizer

TEXTS = ["Once upon a time", "The", "One day, Tom and his dog went to the big park near the lake to play", "She said"]


@pytest.fixture(scope="module")
def story(stories15m):
    return load_model(stories15m, quantize=None, dtype="fp32", device="cpu"), load_tokenizer(stories15m)


def alone(model, prompt, count, stops=frozenset(), **more):
    return list(generate_ids(model, prompt, max_new_tokens=count, stop_ids=stops, **more))


def test_greedy_equals_single_generation(story):
    model, tokenizer = story
    prompts = [tokenizer.encode(text) for text in TEXTS]
    assert len(set(map(len, prompts))) == len(prompts)
    answers = generate_batch(model, prompts, max_new_tokens=40)
    assert answers == [Answer(alone(model, ids, 40), stopped=False) for ids in prompts]
    assert not model.training


@pytest.mark.slow
def test_greedy_of_smollm2_equals_single_generation(smollm2_gguf):
    """No power of two in it, three key/value heads of nine, and an adapter that does something."""
    model, tokenizer = load_model(smollm2_gguf, quantize=None, dtype="fp32", device="cpu"), load_tokenizer(smollm2_gguf)
    attach_lora(model, target_modules=("q_proj", "v_proj"))
    torch.manual_seed(0)
    for _, layer in adapted_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    prompts = [tokenizer.encode(text) for text in ("The capital of France is", "안녕하세요", "A")]
    answers = generate_batch(model, prompts, max_new_tokens=12)
    assert [answer.ids for answer in answers] == [alone(model, ids, 12) for ids in prompts]


def test_nf4_equals_single_generation(stories15m, story):
    """The fused operators at another number of rows: rounding differs, no token does here."""
    model = load_model(stories15m, dtype="fp32", device="cpu")
    prompts = [story[1].encode(text) for text in TEXTS]
    answers = generate_batch(model, prompts, max_new_tokens=16)
    assert [answer.ids for answer in answers] == [alone(model, ids, 16) for ids in prompts]


def test_rows_end_by_themselves_and_leave_the_batch(story, monkeypatch):
    model, tokenizer = story
    prompts = [tokenizer.encode(text) for text in TEXTS]
    free = [alone(model, ids, 30) for ids in prompts]
    stops = frozenset({free[0][5], free[1][2], free[3][9]})
    widths = []
    forward = type(model.stack).forward

    def watched(self, ids, *more, **named):
        widths.append(len(ids))
        return forward(self, ids, *more, **named)

    monkeypatch.setattr(type(model.stack), "forward", watched)
    answers = generate_batch(model, prompts, max_new_tokens=30, stop_ids=stops)
    seen = list(widths)
    assert sorted(seen, reverse=True) == seen
    assert seen[0] == 4
    assert seen[-1] < 4
    for answer, ids in zip(answers, prompts, strict=True):
        expected = alone(model, ids, 30, stops)
        assert answer.stopped == (expected[-1] in stops)
        assert answer.ids == [token for token in expected if token not in stops]
    assert sum(answer.stopped for answer in answers) >= 3


def test_the_context_ends_a_long_row_and_not_a_short_one(story):
    model, tokenizer = story
    short, context = tokenizer.encode("Once upon a time"), model.config.context
    long = (tokenizer.encode("a dog and a cat") * context)[: context - 3]
    answers = generate_batch(model, [long, short], max_new_tokens=12)
    assert answers[0].ids == alone(model, long, 12)
    assert len(answers[0].ids) == 3
    assert answers[1].ids == alone(model, short, 12)


def test_sampling_depends_on_the_seed_and_not_on_the_neighbours(story):
    model, tokenizer = story
    prompts, sampled = [tokenizer.encode(text) for text in TEXTS], {"temperature": 0.9, "top_p": 0.9, "top_k": 50}
    answers = generate_batch(model, prompts, max_new_tokens=12, seeds=[3, 1, 4, 1], **sampled)
    for ids, seed, answer in zip(prompts, [3, 1, 4, 1], answers, strict=True):
        assert answer.ids == alone(model, ids, 12, seed=seed, **sampled)
    assert generate_batch(model, prompts[2:], max_new_tokens=12, seeds=[4, 1], **sampled) == answers[2:]
    others = generate_batch(model, prompts, max_new_tokens=12, seeds=[13, 11, 14, 11], **sampled)
    assert others != answers


SMALL = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=24,
)  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 4, "layer_types": ("sliding_attention", "full_attention"), "model_type": "mistral"},
        {"rope": {"rope_type": "dynamic", "factor": 2.0}},
        {"rope": {"rope_type": "linear", "factor": 2.0}},
    ],
)
def test_windows_and_scalings_equal_single_generation(changes):
    torch.manual_seed(0)
    model = LlamaForCausalLM(dataclasses.replace(SMALL, **changes))
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [1], [2, 3, 4, 5, 6]]
    answers = generate_batch(model, prompts, max_new_tokens=20)
    assert [answer.ids for answer in answers] == [alone(model, ids, 20) for ids in prompts]


def test_prompts_that_can_not_be(story):
    model, _ = story
    assert generate_batch(model, [], max_new_tokens=4) == []
    with pytest.raises(InputError, match="prompt 2 is empty"):
        generate_batch(model, [[1], []], max_new_tokens=4)
    context = model.config.context
    with pytest.raises(InputError, match=f"prompt 1 is {context} tokens long, the model's context {context}"):
        generate_batch(model, [[1] * context], max_new_tokens=4)
