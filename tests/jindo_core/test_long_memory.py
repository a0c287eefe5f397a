"""LongLLaMA: its windows and memory against a plain computation in fp64, and against LLaMA where they are one."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from jindo_core.causal_lm import KVCache
from jindo_core.errors import InputError
from jindo_core.generation import generate_ids
from jindo_core.loader import load_model
from jindo_core.long_memory import LongMemory, memory_attention
from jindo_core.lora import attach_lora
from jindo_core.model import LlamaConfig, LlamaForCausalLM

SMALL = {
    "vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 16, "rms_norm_eps": 1e-5,
}  # fmt: skip
LONG = SMALL | {
    "model_type": "longllama", "mem_layers": [1, 2], "mem_dtype": "float32", "last_context_length": 7,
}  # fmt: skip


def make(raw, dtype=torch.float32):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig.from_dict(raw))
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.25)
    return model.to(dtype).eval()


def tokens(*shape, seed=0):
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


# --- the plain computation: one sequence, one token after another, nothing shared with the engine ---------


def turned(x, place):
    """RoPE of x [heads, D] at a place, in fp64."""
    half = x.shape[-1] // 2
    angle = place * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def normed(x, weight):
    return x / (x.square().mean() + 1e-5).sqrt() * weight


def attended(q, local, past, place):
    """One query [H, D] at its place, over [(k, v, place)] of its window and [(k, v)] of memory: one softmax."""
    keys = torch.stack([turned(k, at) for k, _, at in local] + [k for k, _ in past]).repeat_interleave(3, dim=1)
    values = torch.stack([v for _, v, _ in local] + [v for _, v in past]).repeat_interleave(3, dim=1)
    scores = torch.einsum("hd,shd->hs", turned(q, place), keys) / math.sqrt(q.shape[-1])
    return torch.einsum("hs,shd->hd", scores.softmax(-1), values).flatten()


def naive_logits(model, ids, windows, mem_layers, kept=torch.float64):
    """[T, V] in fp64. windows: (start, end) of each."""
    w = {name: value.detach().double() for name, value in model.state_dict().items()}
    xs = [w["model.embed_tokens.weight"][i] for i in ids.tolist()]
    for layer in range(3):
        at = {name.split(f"layers.{layer}.")[1]: v for name, v in w.items() if f"layers.{layer}." in name}
        projected = []
        for x in xs:
            h = normed(x, at["input_layernorm.weight"])
            q, k, v = (at[f"self_attn.{n}_proj.weight"] @ h for n in "qkv")
            projected.append((q.view(6, 8), k.view(2, 8), v.view(2, 8)))
        out = []
        for start, end in windows:
            past = [(k.to(kept).double(), v.to(kept).double()) for _, k, v in projected[:start]]
            for t in range(start, end):
                local = [(projected[s][1], projected[s][2], s - start) for s in range(start, t + 1)]
                y = attended(projected[t][0], local, past if layer in mem_layers else [], t - start)
                x = xs[t] + at["self_attn.o_proj.weight"] @ y
                h = normed(x, at["post_attention_layernorm.weight"])
                gate, up = at["mlp.gate_proj.weight"] @ h, at["mlp.up_proj.weight"] @ h
                out.append(x + at["mlp.down_proj.weight"] @ (gate / (1 + (-gate).exp()) * up))
        xs = out
    return torch.stack([w["lm_head.weight"] @ normed(x, w["model.norm.weight"]) for x in xs])


# --- against it -----------------------------------------------------------------------------------------


def windows_of(length, context=16, last=7):
    """Written again from the words: all but the last 7 tokens in windows of 16, then those."""
    cuts = [*range(0, max(length - last, 0), context), max(length - last, 0), length]
    return [(a, b) for a, b in itertools.pairwise(cuts) if a < b]


@pytest.mark.parametrize("length", [7, 8, 23, 24, 50])
def test_logits_equal_the_plain_computation(length):
    model, ids = make(LONG), tokens(1, length)
    expected = naive_logits(model, ids[0], windows_of(length), (1, 2))
    with torch.no_grad():
        got = model(ids).logits[0]
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=0)


def test_memory_is_kept_in_its_dtype():
    model, ids = make({**LONG, "mem_dtype": "bfloat16"}), tokens(1, 30)
    exact = naive_logits(model, ids[0], windows_of(30), (1, 2))
    rounded = naive_logits(model, ids[0], windows_of(30), (1, 2), torch.bfloat16)
    apart = (exact - rounded).abs().max()
    cache = KVCache(model.config, 1, 30, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        for got in (model(ids).logits[0], model(ids, cache=cache).logits[0]):
            assert (got - rounded).abs().max() < 0.1 * apart  # near a tie one may round the other way
    assert cache.memory._keys.dtype == torch.bfloat16


def test_layers_without_positions():
    """mem_positionals false: the memory layers turn nothing, in the window neither."""
    model, ids = make({**LONG, "mem_layers": [0, 1, 2], "mem_positionals": False}), tokens(1, 20)
    with torch.no_grad():
        forth = model(ids[:, :7]).logits[0, -1]
        back = model(torch.cat([ids[:, :6].flip(1), ids[:, 6:7]], dim=1)).logits[0, -1]
        turning = make({**LONG, "mem_layers": [0, 1, 2]})
        other = turning(ids[:, :7]).logits[0, -1]
        cache = KVCache(model.config, 1, 20, torch.float32, torch.device("cpu"))
        torch.testing.assert_close(model(ids, cache=cache).logits, model(ids).logits, atol=1e-4, rtol=0)
    assert (forth - other).abs().max() > 1e-2
    # One layer would see the others in any order; with three, causality tells orders apart.
    assert (forth - back).abs().max() > 1e-3


@pytest.mark.parametrize("where", ["model", "cache"])
@pytest.mark.parametrize("grouping", [(1, 1), (2, 3), (4, 100), (100, 5)])
def test_grouping_changes_nothing(grouping, where):
    plain, grouped = make(LONG), make({**LONG, "mem_attention_grouping": list(grouping)})
    assert grouped.config.memory.grouping == grouping
    ids = tokens(2, 41)
    caches = [KVCache(m.config, 2, 41, torch.float32, torch.device("cpu")) for m in (plain, grouped)]
    with torch.no_grad():
        a, b = (
            m(ids, cache=cache if where == "cache" else None).logits
            for m, cache in zip((plain, grouped), caches, strict=True)
        )
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_what_fits_one_window_is_llama_bit_for_bit():
    ids, long, plain = tokens(2, 7), make(LONG), make(SMALL | {"model_type": "llama"})
    with torch.no_grad():
        assert torch.equal(long(ids).logits, plain(ids).logits)
    assert not torch.equal(long(tokens(2, 8)).logits, plain(tokens(2, 8)).logits)


@pytest.mark.parametrize("raw", [{"model_type": "longllama"}, {"model_type": "longllama", "mem_layers": []}])
def test_without_memory_layers_it_is_llama(raw):
    ids, model = tokens(1, 16), make(SMALL | raw)
    assert model.config.memory is None
    with torch.no_grad():
        assert torch.equal(model(ids).logits, make(SMALL | {"model_type": "llama"})(ids).logits)


def test_a_llama_with_these_keys_is_a_longllama():
    ids = tokens(1, 30)
    with torch.no_grad():
        assert torch.equal(make(LONG | {"model_type": "llama"})(ids).logits, make(LONG)(ids).logits)


# --- a cache, generation, training ------------------------------------------------------------------------


@pytest.mark.parametrize("length", [5, 7, 8, 23, 24, 50])
def test_a_prompt_read_into_a_cache_equals_one_pass(length):
    """Window by window there, layer by layer here."""
    model, ids = make(LONG), tokens(2, length)
    cache = KVCache(model.config, 2, length, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(model(ids, cache=cache).logits, model(ids).logits, atol=1e-4, rtol=0)
    assert cache.memory.length + cache.length == length
    assert cache.length == min(length, 7)


def test_a_full_window_joins_memory_while_text_goes_on():
    """Tokens one by one: the window fills up to the context of 16, then begins again, twice."""
    model, ids = make(LONG), tokens(1, 60)
    cache = KVCache(model.config, 1, 60, torch.float32, torch.device("cpu"))
    held = []
    with torch.no_grad():
        logits = [model(ids[:, :20], cache=cache).logits]  # 13 to memory, 7 in the window
        for t in range(20, 60):
            logits.append(model(ids[:, t : t + 1], cache=cache).logits)
            held.append((cache.memory.length, cache.length))
    assert held[8:10] == [(13, 16), (29, 1)]
    assert held[24:26] == [(29, 16), (45, 1)]
    windows = [(0, 13), (13, 29), (29, 45), (45, 60)]
    expected = naive_logits(model, ids[0], windows, (1, 2))
    torch.testing.assert_close(torch.cat(logits, dim=1)[0].double(), expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="the cache holds 60 tokens, 61 are needed"), torch.no_grad():
        model(ids[:, :1], cache=cache)


def test_generation_beyond_the_context():
    """A prompt of three contexts, read from memory: greedy tokens as the plain computation says them."""
    model, ids = make(LONG), tokens(1, 48)[0].tolist()
    made = list(generate_ids(model, ids, max_new_tokens=20))
    assert len(made) == 20
    # 48 = 16 + 16 + 9 and the last 7; after 9 more the window is full.
    windows = [(0, 16), (16, 32), (32, 41), (41, 57), (57, 67)]
    text = torch.tensor(ids + made[:-1])
    assert naive_logits(model, text, windows, (1, 2))[47:].argmax(-1).tolist() == made


def test_an_earlier_window_is_heard_through_memory_alone():
    ids = tokens(1, 30)
    other = ids.clone()
    other[0, 2] = (ids[0, 2] + 1) % 61
    with torch.no_grad():
        model = make(LONG)
        assert (model(ids).logits[0, -1] - model(other).logits[0, -1]).abs().max() > 1e-4
        deaf = make(LONG)
        for layer in deaf.model.layers:
            layer.self_attn.memory = dataclasses.replace(layer.self_attn.memory, layers=())
        assert torch.equal(deaf(ids).logits[0, -1], deaf(other).logits[0, -1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_in_no_memory(side):
    """A padded row's logits are those of the same windows with its padding cut out of memory."""
    model, ids = make(LONG), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[1, slice(None, 9) if side == "left" else slice(-3, None)] = 0
    other = torch.where(mask.bool(), ids, (ids + 5) % 61)
    with torch.no_grad():
        got, again = model(ids, attention_mask=mask).logits, model(other, attention_mask=mask).logits
        torch.testing.assert_close(got[0], model(ids).logits[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(got[mask.bool()], again[mask.bool()], atol=1e-5, rtol=0)
    assert got.isfinite().all()


def adapted(changes):
    model = make(LONG | changes).train()
    attach_lora(model, r=2, alpha=4, target_modules=["k_proj", "v_proj"])
    torch.manual_seed(3)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.2)
    return model


def test_gradients_flow_through_memory_checkpointed_or_not():
    """As finite differences say; with checkpointing and in groups the same."""
    ids = tokens(1, 25)
    labels = ids.clone()
    labels[:, :18] = -100  # the loss is in the last window: what was before is heard through memory
    found = []
    for changes, checkpointed in (({}, False), ({}, True), ({"mem_attention_grouping": [2, 3]}, True)):
        model = adapted(changes)
        model.model.gradient_checkpointing = checkpointed
        model(ids, labels=labels).loss.backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
    plain, *others = found
    for key, grad in plain.items():
        for other in others:
            assert (other[key] - grad).abs().max() <= 1e-4 * grad.abs().max(), key
    model = adapted({})
    for layer, name in ((1, "k_proj"), (2, "v_proj")):
        parameter = model.get_submodule(f"model.layers.{layer}.self_attn.{name}").lora_B
        grad = plain[f"model.layers.{layer}.self_attn.{name}.lora_B"]
        place = divmod(int(grad.abs().argmax()), grad.shape[1])
        with torch.no_grad():
            losses = []
            for step in (1e-2, -2e-2):
                parameter[place] += step
                losses.append(model(ids, labels=labels).loss.double())
            parameter[place] += 1e-2
        assert float(losses[0] - losses[1]) / 2e-2 == pytest.approx(float(grad[place]), rel=1e-2)


def test_a_quantized_checkpoint_with_memory_reads_long_prompts(stories260k, tmp_path):
    """LLaMA's weights and names, quantized, with memory switched on in config.json."""
    shutil.copytree(stories260k, tmp_path / "long")
    config = json.loads((stories260k / "config.json").read_text())
    config |= {"model_type": "longllama", "mem_layers": [2, 4], "max_position_embeddings": 64}
    (tmp_path / "long").chmod(0o755)
    (tmp_path / "long" / "config.json").unlink()
    (tmp_path / "long" / "config.json").write_text(json.dumps(config | {"last_context_length": 32}))
    model = load_model(tmp_path / "long", dtype="fp32", device="cpu")
    plain = load_model(stories260k, dtype="fp32", device="cpu")
    assert model.config.memory == LongMemory((2, 4), 64, last_context_length=32)
    ids = torch.randint(3, 512, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(ids[:, :32]).logits, plain(ids[:, :32]).logits)
        cache = KVCache(model.config, 1, 200, torch.float32, torch.device("cpu"))
        torch.testing.assert_close(model(ids, cache=cache).logits, model(ids).logits, atol=1e-4, rtol=0)
    assert len(list(generate_ids(model, ids[0].tolist(), max_new_tokens=5))) == 5


# --- parts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (3, 1)], ids=str)
def test_memory_attention_is_one_softmax(heads):
    h, g = heads
    generator = torch.Generator().manual_seed(0)
    q, k, v, mk, mv = (
        torch.randn(2, n, t, 8, generator=generator, dtype=torch.float64)
        for n, t in ((h, 5), (g, 9), (g, 9), (g, 11), (g, 11))
    )
    keys, values = (torch.cat(pair, dim=2).repeat_interleave(h // g, dim=1) for pair in ((mk, k), (mv, v)))
    scores = q @ keys.transpose(2, 3) / math.sqrt(8)
    for t in range(5):
        scores[:, :, t, 11 + 4 + t + 1 :] = -math.inf
    expected = scores.softmax(-1) @ values
    for grouping in (None, (1, 2), (2, 5)):
        torch.testing.assert_close(memory_attention(q, k, v, mk, mv, grouping=grouping), expected)


def test_grouping_bounds_what_is_worked_on(monkeypatch):
    real, seen = F.scaled_dot_product_attention, []

    def watch(q, k, v, **options):
        seen.append((q.shape[1], q.shape[2], k.shape[1]))
        return real(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    q, k = torch.randn(1, 6, 7, 8), torch.randn(1, 2, 7, 8)
    memory_attention(q, k, k, k, k, grouping=(4, 3))
    assert seen == [(heads, queries, heads) for heads in (4, 2) for queries in (3, 3, 1)]


def test_windows_follow_the_authors():
    memory = LongMemory(layers=(1,), context=16, last_context_length=7)
    for length in (1, 7, 8, 16, 23, 24, 39, 100):
        assert memory.windows(length) == windows_of(length)
        assert memory.places(length, torch.device("cpu"))[0].tolist() == [
            t - start for start, end in windows_of(length) for t in range(start, end)
        ]


def test_positions_and_padding_that_windows_can_not_take_are_refused():
    model = make(LONG)
    cache = KVCache(model.config, 1, 30, torch.float32, torch.device("cpu"))
    ids = tokens(1, 20)
    for options in (
        {"position_ids": torch.arange(20)[None]}, {"cache": cache, "attention_mask": torch.ones_like(ids)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="counts positions in its windows"):
            model(ids, **options)


@pytest.mark.parametrize(("changes", "message"), [
    ({"mem_layers": [3]}, r"mem_layers \[3\], expected different layers from 0 to 2"),
    ({"mem_layers": [1, 1]}, r"mem_layers \[1, 1\], expected different layers"),
    ({"mem_layers": "1"}, "mem_layers '1', expected different layers"),
    ({"mem_layers": [True]}, r"mem_layers \[True\], expected different layers"),
    ({"mem_dtype": "int8"}, "mem_dtype 'int8', expected one of bfloat16, float16, float32"),
    ({"mem_dtype": ["int8"]}, r"mem_dtype \['int8'\], expected one of"),
    ({"mem_attention_grouping": [4]}, r"mem_attention_grouping \[4\], expected null or two positive"),
    ({"mem_attention_grouping": [4, 0]}, "expected null or two positive whole numbers"),
    ({"mem_attention_grouping": 5}, "mem_attention_grouping 5, expected null or two"),
    ({"last_context_length": 17}, "last_context_length 17, expected 1 to max_position_embeddings, 16"),
    ({"last_context_length": 0}, "last_context_length 0, expected 1 to"),
    ({"mem_positionals": "no"}, "mem_positionals 'no', expected true or false"),
])  # fmt: skip
def test_a_memory_that_can_not_be_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        LlamaConfig.from_dict(LONG | changes)
