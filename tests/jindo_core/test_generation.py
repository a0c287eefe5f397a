"""Greedy text token by token as transformers', sampling, stopping, streaming."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import jindo_core
from jindo_core.adapters import save_adapter
from jindo_core.cli.main import main
from jindo_core.errors import InputError
from jindo_core.generation import generate, generate_ids, pick_token
from jindo_core.head import StreamedHead
from jindo_core.loader import load_model
from jindo_core.lora import adapted_layers, attach_lora
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


@pytest.mark.slow
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


@pytest.mark.parametrize("place", ["host", "folder"])
def test_the_command_answers_with_everything_offloaded(place, stories260k, tmp_path, capsys, monkeypatch):
    """The same answer, an adapter included, from a model whose layers, head and embedding lie elsewhere."""
    model = attach_lora(load_model(stories260k, dtype="fp32", device="cpu"), target_modules="all-linear")
    for _, layer in adapted_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    save_adapter(model, tmp_path / "adapter", base_model=str(stories260k))
    seen = []

    def watched(*args, **more):
        seen.append(load_model(*args, **more))
        return seen[-1]

    monkeypatch.setattr("jindo_core.loader.load_model", watched)
    flags = ["--lora_weights", str(tmp_path / "adapter"), "--instruction", "Tell me.", "--device", "cpu"]
    flags += ["--prompt_template_name", "alpaca_short", "--max_new_tokens", "12", "--dtype", "fp32"]
    offload = ["--offload_layers", "3", "--offload-head", "--offload_embedding"]
    offload += [] if place == "host" else ["--offload_folder", str(tmp_path)]
    answers = []
    for more in ([], offload):
        assert main(["generate", *flags, *more]) == 0
        said = capsys.readouterr()
        answers.append(said.out)
        assert "no effect" not in said.err
    assert answers[0] == answers[1]
    assert len(answers[0]) > 10
    assert seen[0].stack.stream is None
    assert len(seen[1].stack.stream.layers) == 3
    assert isinstance(seen[1].lm_head, StreamedHead)
    assert main(["generate", *flags, "--offload_embedding"]) == 0
    assert "--offload_embedding has no effect: this model's embedding is its head" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--offload_layers", "9"], "offload_layers is 9, expected 0 to 5"),
        (["--offload_layers", "-1"], "--offload_layers: got '-1', expected a whole number of at least 0"),
        (["--offload_layers", "2", "--quantize", "none"], "offload_layers needs quantize 'nf4'"),
        (["--offload_folder", "nowhere"], "nowhere"),
    ],
)
def test_offloading_that_can_not_be(more, message, stories260k, capsys):
    flags = ["--base_model", str(stories260k), "--instruction", "Tell me.", "--device", "cpu"]
    assert main(["generate", *flags, *more]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[-1].startswith("error: ")
    assert message in said.err


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
        draws = [pick_token(logits, temperature, top_p, top_k, generator) for _ in range(400)]
        return {token: draws.count(token) / 400 for token in set(draws)}

    everything = seen()
    assert set(everything) == {0, 1, 2, 3}
    assert everything[0] == pytest.approx(0.5, abs=0.1)
    assert set(seen(top_k=2)) == {0, 1}
    assert set(seen(top_p=0.75)) == {0, 1}
    assert set(seen(top_p=0.76)) == {0, 1, 2}
    assert set(seen(top_p=0.01)) == {0}
    assert set(seen(temperature=0.01)) == {0}
    assert pick_token(logits, 0.0, 1.0, 0, None) == 0


def test_a_prompt_as_ids_and_other_ends(story):
    model, tokenizer = story
    ids = tokenizer.encode("Once upon a time")
    text = generate(model, tokenizer, "Once upon a time", max_new_tokens=12)
    assert generate(model, tokenizer, ids, max_new_tokens=12) == text
    tokens = list(generate_ids(model, ids, max_new_tokens=12))
    stopped = generate(model, tokenizer, ids, max_new_tokens=12, ends=frozenset({tokens[4]}))
    assert stopped == tokenizer.decode([*ids, *tokens[:4]]).removeprefix("Once upon a time")


def test_the_command_asks_as_the_template_trains(stories15m, capsys, monkeypatch):
    """Special tokens in what the user wrote are text; the system message goes where the template has it."""
    import jindo_core.generation as generation

    asked = {}

    def record(model, tokenizer, prompt, **settings):
        asked.update(prompt=list(prompt), ends=settings["ends"], tokenizer=tokenizer)
        return "answer"

    monkeypatch.setattr(generation, "generate", record)
    flags = ["generate", "--base_model", str(stories15m), "--quantize", "none", "--device", "cpu", "--dtype", "fp32"]
    told = ["--system", "Be kind."]
    assert main([*flags, "--prompt_template_name", "vicuna_v1.1", *told, "--instruction", "a </s>"]) == 0
    tokenizer = asked["tokenizer"]
    assert asked["prompt"] == tokenizer.encode("Be kind. USER: a </s> ASSISTANT:")
    assert asked["ends"] == {2}
    assert main([*flags, "--prompt_template_name", "alpaca", *told, "--instruction", "a"]) == 2
    assert main([*flags, "--prompt_template_name", "chat", "--instruction", "a"]) == 2
    errors = capsys.readouterr().err
    assert "has a system message, for which template alpaca has no place" in errors
    assert "this model's tokenizer brings no chat template" in errors
