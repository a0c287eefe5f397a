"""The prepared decoding step: the model's own logits, token by token."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from torch import nn

from jindo_core.causal_lm import KVCache
from jindo_core.decoding import Decoder, FixedStep, GraphedStep, _capturable
from jindo_core.kernels import native
from jindo_core.long_memory import LongMemory
from jindo_core.lora import attach_lora
from jindo_core.model import LlamaConfig, LlamaForCausalLM
from jindo_core.nf4 import NF4Linear

CONFIG = LlamaConfig(
    vocab_size=97, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=64,
)  # fmt: skip


def make_model(dtype, *, rank=0, double_quant=True, tied=False, config=CONFIG):
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, NF4Linear.from_linear(child, double_quant=double_quant))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.normal_(parameter, 1.0, 0.2)
    if rank:
        attach_lora(model, r=rank, alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                nn.init.normal_(parameter, std=0.1)
    return model.eval()


def logits_both_ways(model, batch, prompt=5, new=6):
    """(prepared, module by module) logits of `new` tokens after a prompt, and the two caches."""
    dtype = model.dtype
    generator = torch.Generator().manual_seed(1)
    vocab = model.config.vocab_size
    ids = torch.randint(vocab, (batch, prompt), generator=generator)
    caches = [KVCache(model.config, batch, prompt + new, dtype, torch.device("cpu")) for _ in range(2)]
    results = []
    with torch.no_grad():
        for cache in caches:
            model.model(ids, cache=cache)
        decoder = Decoder(model, caches[0])
        assert decoder._step is not None
        for _ in range(new):
            token = torch.randint(vocab, (batch,), generator=generator)
            prepared = decoder(token).clone()
            plain = model.lm_head(model.model(token[:, None], cache=caches[1])[:, -1]).float()
            results.append((prepared, plain))
    return results, caches


@pytest.mark.parametrize("level", native.LEVELS)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_logits_and_cache_in_fp32(batch, rank, double_quant, level):
    with native.level(level):
        results, caches = logits_both_ways(make_model(torch.float32, rank=rank, double_quant=double_quant), batch)
    for prepared, plain in results:
        assert (prepared - plain).abs().max() <= 5e-6 * plain.abs().max()
    assert caches[0].length == caches[1].length
    torch.testing.assert_close(caches[0].keys, caches[1].keys, atol=2e-6, rtol=0)
    torch.testing.assert_close(caches[0].values, caches[1].values, atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_half_precision(dtype):
    """As near to the fp32 model as the module-by-module path is."""
    model = make_model(dtype, rank=4)
    results, _ = logits_both_ways(model, 2)
    wide, _ = logits_both_ways(make_model(dtype, rank=4).float(), 2)
    ours = max((prepared - exact).abs().max() for (prepared, _), (_, exact) in zip(results, wide, strict=True))
    theirs = max((plain - exact).abs().max() for (_, plain), (_, exact) in zip(results, wide, strict=True))
    assert ours <= 1.5 * theirs


def test_head_size_and_widths_that_are_no_multiples_of_a_register():
    config = LlamaConfig(
        vocab_size=33, hidden_size=64, intermediate_size=320, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    for dtype, allowed in ((torch.float32, 5e-6), (torch.bfloat16, 3e-2)):
        results, _ = logits_both_ways(make_model(dtype, config=config, rank=2), 2)
        for prepared, plain in results:
            assert (prepared - plain).abs().max() <= allowed * plain.abs().max()


def test_another_number_of_threads_is_an_error():
    model = make_model(torch.float32)
    cache = KVCache(CONFIG, 1, 8, torch.float32, torch.device("cpu"))
    threads = torch.get_num_threads()
    with torch.no_grad():
        model.model(torch.tensor([[1, 2]]), cache=cache)
        decoder = Decoder(model, cache)
        try:
            torch.set_num_threads(threads + 1)
            with pytest.raises(RuntimeError, match=f"prepared for {threads} threads"):
                decoder(torch.tensor([3]))
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("why", ["hook", "dense", "memory"])
def test_other_models_run_module_by_module(why):
    model = make_model(torch.float32)
    layer = model.model.layers[1].mlp
    calls = []
    if why == "hook":
        layer.up_proj.register_forward_hook(lambda *_: calls.append(1))
    elif why == "dense":
        layer.up_proj = nn.Linear(128, 192, bias=False)
    else:
        memory = LongMemory(layers=(1,), context=64, last_context_length=32)
        model = make_model(torch.float32, config=dataclasses.replace(CONFIG, memory=memory))
    cache, other = (KVCache(model.config, 1, 8, torch.float32, torch.device("cpu")) for _ in range(2))
    with torch.no_grad():
        model.model(torch.tensor([[1, 2]]), cache=cache)
        model.model(torch.tensor([[1, 2]]), cache=other)
        decoder = Decoder(model, cache)
        assert decoder._step is None
        logits = decoder(torch.tensor([3]))
        assert torch.equal(logits, model.lm_head(model.model(torch.tensor([[3]]), cache=other)[:, -1]))
    assert len(calls) == (4 if why == "hook" else 0)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [11, 32])
def test_the_step_that_a_gpu_captures_gives_the_model_s_logits(batch, size):
    model = make_model(torch.float32, rank=4)
    caches = [KVCache(model.config, batch, 32, torch.float32, torch.device("cpu")) for _ in range(2)]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(97, (batch, 11), generator=generator)
    with torch.no_grad():
        for cache in caches:
            model.model(ids[:, :5], cache=cache)
        step = FixedStep(model, caches[0], size)
        step._keys[:, :, :, 5:] = 1e4
        step._values[:, :, :, 5:] = 1e4
        for i in range(5, 11):
            step.tokens.copy_(ids[:, i])
            step.place.fill_(i)
            wanted = model.lm_head(model.model(ids[:, i : i + 1], cache=caches[1])[:, -1])
            torch.testing.assert_close(step.run(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(caches[0].keys[:, :, :, :11], caches[1].keys[:, :, :, :11], rtol=1e-4, atol=1e-4)


def test_only_a_model_on_a_gpu_is_captured():
    assert not _capturable(make_model(torch.float32))


@pytest.fixture
def graphs_on_the_cpu(monkeypatch):
    """CUDA graphs whose replay runs the step again into the same logits; what was captured is listed."""
    captured = []

    class Graph:
        def replay(self):
            self.owner._logits.copy_(self.owner._step.run())

    real = GraphedStep._capture

    def capture(self, tokens):
        real(self, tokens)
        self._captured.owner = self
        captured.append(self._size)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(GraphedStep, "_capture", capture)
    monkeypatch.setattr(GraphedStep, "WINDOW", 8)
    return captured


def test_a_graph_is_captured_for_each_window(graphs_on_the_cpu):
    model = make_model(torch.float32, rank=4)
    caches = [KVCache(model.config, 2, 20, torch.float32, torch.device("cpu")) for _ in range(2)]
    for cache in caches:  # as fresh memory may be
        cache.keys.fill_(float("nan"))
        cache.values.fill_(float("nan"))
    ids = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for cache in caches:
            model.model(ids[:, :5], cache=cache)
        step = GraphedStep(model, caches[0])
        for _ in range(2):
            caches[0].length = caches[1].length = 5
            for i in range(5, 20):
                wanted = model.lm_head(model.model(ids[:, i : i + 1], cache=caches[1])[:, -1])
                torch.testing.assert_close(step(ids[:, i]), wanted, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="the cache holds 20 tokens, 21 are needed"):
            step(ids[:, 0])
    assert graphs_on_the_cpu == [8, 16, 20], "set back, the widest window serves on"


@pytest.mark.parametrize("prepared", [True, False])
def test_a_full_cache_is_refused_alike(prepared):
    model = make_model(torch.float32) if prepared else LlamaForCausalLM(CONFIG).eval()
    cache = KVCache(CONFIG, 1, 2, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        model.model(torch.tensor([[1, 2]]), cache=cache)
        decoder = Decoder(model, cache)
        assert (decoder._step is not None) == prepared
        with pytest.raises(ValueError, match="the cache holds 2 tokens, 3 are needed"):
            decoder(torch.tensor([3]))
