"""Mistral, Qwen2 and the LLaMAs of other makers against transformers: logits, gradients, every way of decoding."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from jindo_core import model as ours_module
from jindo_core.causal_lm import KVCache
from jindo_core.decoding import Decoder, FixedStep
from jindo_core.errors import InputError
from jindo_core.families import as_llama
from jindo_core.generation import generate_ids
from jindo_core.kernels import native
from jindo_core.loader import load_model
from jindo_core.lora import adapted_layers, attach_lora
from jindo_core.memory import sizes_of
from jindo_core.nf4 import NF4Linear
from jindo_core.plan import Job, plan

SMALL = {
    "vocab_size": 131, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2, "rms_norm_eps": 1e-5,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 500000.0,
}  # fmt: skip
SOME = ["sliding_attention", "full_attention", "sliding_attention"]
CASES = {
    "mistral": MistralConfig(**SMALL, sliding_window=7),
    "mistral_without_window": MistralConfig(**SMALL, sliding_window=None, head_dim=32),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen2_upper_layers_sliding": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen2_some_layers_sliding": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=9, layer_types=SOME),
    "llama3": LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "tinyllama": LlamaConfig(**(SMALL | {"num_attention_heads": 8, "num_key_value_heads": 1})),
}
SLIDING = [name for name in CASES if "sliding" in name or name == "mistral"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> (a random model of that case, the folder where transformers saved it)."""
    made = {}

    def one(name):
        if name not in made:
            torch.manual_seed(0)
            theirs = AutoModelForCausalLM.from_config(copy.deepcopy(CASES[name]), dtype=torch.float32).eval()
            with torch.no_grad():
                for key, parameter in theirs.named_parameters():  # transformers starts them at 0 and 1
                    if key.endswith("bias") or "norm" in key:
                        parameter.add_(torch.randn_like(parameter) * 0.3)
            folder = tmp_path_factory.mktemp(name)
            theirs.save_pretrained(folder)
            made[name] = theirs, folder
        return made[name]

    return one


def load(folder, **options):
    return load_model(folder, dtype="fp32", device="cpu", **options)


def quantized_pair(theirs, folder):
    """Our model in NF4, and theirs with the same weights dequantized."""
    ours, dense = load(folder), copy.deepcopy(theirs)
    with torch.no_grad():
        for path, module in ours.named_modules():
            if isinstance(module, NF4Linear):
                dense.get_submodule(path).weight.copy_(module.nf4.dequantize())
    return ours, dense


def tokens(*shape, seed=0):
    return torch.randint(3, 131, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CASES)
def test_logits_of_a_saved_model(name, saved):
    theirs, folder = saved(name)
    ours, ids = load(folder, quantize=None), tokens(2, 45)
    with torch.no_grad():
        got, expected = ours(ids).logits, theirs(ids).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", SLIDING)
def test_the_window_matters_from_its_length_on(name, saved):
    """Without it, the logits of what it does not reach are the same, the others are not."""
    _, folder = saved(name)
    ours, ids = load(folder, quantize=None), tokens(1, 45)
    assert [ours.config.window(i) for i in range(3)] == {
        "mistral": [7, 7, 7], "qwen2_upper_layers_sliding": [None, 6, 6], "qwen2_some_layers_sliding": [9, None, 9],
    }[name]  # fmt: skip
    ours.config = ours.model.config = dataclasses.replace(ours.config, sliding_window=None)
    for layer in ours.model.layers:
        layer.self_attn.window = None
    with torch.no_grad():
        difference = (ours(ids).logits - load(folder, quantize=None)(ids).logits).abs().amax(-1)[0]
    assert difference[:6].max() < 1e-4
    assert difference[12:].min() > 1e-2


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["mistral", "qwen2_some_layers_sliding"])
def test_padding_and_windows(name, side, saved):
    theirs, folder = saved(name)
    ours, ids = load(folder, quantize=None), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[1, slice(None, 11) if side == "left" else slice(-11, None)] = 0
    with torch.no_grad():
        got, expected = ours(ids, attention_mask=mask).logits, theirs(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)
    assert got.isfinite().all()


@pytest.mark.parametrize(("name", "how"), [(name, "plain") for name in CASES] + [
    (name, how) for name in ("mistral", "qwen2_upper_layers_sliding") for how in ("checkpointed", "streamed")
])  # fmt: skip
def test_loss_and_gradients_of_adapters_on_quantized_weights(name, how, saved):
    """All linear layers, biases and windows under NF4, against peft on the same weights dequantized."""
    theirs, folder = saved(name)
    _, dense = quantized_pair(theirs, folder)
    ours = load(folder, offload_layers=2) if how == "streamed" else load(folder)
    torch.manual_seed(1)
    attach_lora(ours, r=3, alpha=6, target_modules="all-linear")
    peer = get_peft_model(dense, LoraConfig(r=3, lora_alpha=6, target_modules="all-linear"))
    ours.train()
    ours.model.gradient_checkpointing = how == "checkpointed"
    pairs = []
    for path, layer in adapted_layers(ours):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
        module = peer.base_model.model.get_submodule(path)
        for mine, their in ((layer.lora_A, module.lora_A.default), (layer.lora_B, module.lora_B.default)):
            their.weight.data.copy_(mine.data)
            pairs.append((path, mine, their.weight))
    assert len(pairs) == 3 * 7 * 2
    ids = tokens(2, 33)
    got, expected = ours(ids, labels=ids).loss, peer(ids, labels=ids).loss
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)
    got.backward()
    expected.backward()
    for path, mine, their in pairs:
        limit = 1e-4 * their.grad.abs().max()
        assert (mine.grad - their.grad).abs().max() <= limit, path


@pytest.fixture
def peer_text(saved):
    """(the quantized model, a prompt, 48 tokens that transformers' greedy generate says behind it)."""

    def one(name):
        ours, dense = quantized_pair(*saved(name))
        prompt = tokens(1, 5, seed=3)
        out = dense.generate(prompt, max_new_tokens=48, do_sample=False, eos_token_id=None, pad_token_id=0)
        said = out[0, 5:].tolist()
        assert len(said) == 48
        return ours, prompt, said

    return one


@pytest.mark.parametrize("name", CASES)
def test_greedy_text_without_a_cache_and_with_one(name, peer_text):
    """A pass over everything for each token; the cache, module by module; and what `generate` chooses."""
    ours, prompt, said = peer_text(name)
    whole = torch.cat([prompt, torch.tensor([said])], dim=1)
    with torch.no_grad():
        assert ours(whole[:, :-1]).logits[0, 4:].argmax(-1).tolist() == said
        cache = KVCache(ours.config, 1, 64, torch.float32, torch.device("cpu"))
        hidden, heard = ours.model(prompt, cache=cache), []
        for _ in range(48):
            heard.append(int(ours.lm_head(hidden[:, -1]).argmax()))
            hidden = ours.model(torch.tensor([[heard[-1]]]), cache=cache)
    assert heard == said
    assert list(generate_ids(ours, prompt[0].tolist(), max_new_tokens=48)) == said


@pytest.mark.parametrize("level", native.LEVELS)
@pytest.mark.parametrize("name", CASES)
def test_greedy_text_of_the_prepared_step(name, level, peer_text):
    """csrc/decode.c: windows and biases, each instruction set."""
    ours, prompt, said = peer_text(name)
    cache = KVCache(ours.config, 1, 64, torch.float32, torch.device("cpu"))
    with torch.no_grad(), native.level(level):
        logits, heard = ours.lm_head(ours.model(prompt, cache=cache)[:, -1]), []
        decoder = Decoder(ours, cache)
        assert decoder._step is not None
        for _ in range(48):
            heard.append(int(logits.argmax()))
            logits = decoder(torch.tensor(heard[-1:]))
    assert heard == said


@pytest.mark.parametrize("name", SLIDING)
def test_greedy_text_of_the_step_that_a_gpu_captures(name, peer_text):
    ours, prompt, said = peer_text(name)
    cache = KVCache(ours.config, 1, 64, torch.float32, torch.device("cpu"))
    cache.keys.zero_()
    cache.values.zero_()
    with torch.no_grad():
        logits, heard = ours.lm_head(ours.model(prompt, cache=cache)[:, -1]), []
        step = FixedStep(ours, cache, 64)
        for place in range(5, 53):
            heard.append(int(logits.argmax()))
            step.tokens.fill_(heard[-1])
            step.place.fill_(place)
            logits = step.run()
    assert heard == said


@pytest.mark.parametrize("name", ["mistral", "qwen2_some_layers_sliding"])
def test_a_prompt_in_pieces_equals_one_pass(name, saved):
    ours, ids = load(saved(name)[1], quantize=None), tokens(2, 40)
    cache = KVCache(ours.config, 2, 40, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        pieces = [ours(part, cache=cache).logits for part in ids.split([9, 20, 1, 1, 9], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), ours(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_the_plan_counts_every_element(name, saved):
    ours = load(saved(name)[1], quantize=None)
    sizes = sizes_of(ours.config)
    rows = plan(Job(sizes=sizes, quantized=False, itemsize=4)).rows
    counted = sum(rows[row] for row in ("weights", "embedding", "head", "norms"))
    assert counted == 4 * sum(parameter.numel() for parameter in ours.parameters())
    assert sizes.biases == (256 if name == "qwen2" else 0)


def write_gguf(file, theirs, kind, window=None):
    """As llama.cpp's converter lays it out: a LLaMA's q and k interleaved, biases too; a Qwen2's as they are."""
    import gguf

    writer = gguf.GGUFWriter(file, kind)
    if window:
        writer.add_sliding_window(window)
    writer.add_embedding_length(128)
    writer.add_feed_forward_length(192)
    writer.add_block_count(3)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, kind.upper()), 3)
    for key, value in theirs.state_dict().items():
        if key == "lm_head.weight" and theirs.config.tie_word_embeddings:
            continue
        heads = 4 if ".q_proj." in key else 2 if ".k_proj." in key else 0
        if kind == "llama" and heads:
            value = value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(key, (".weight", ".bias")), value.numpy().copy())
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return file


@pytest.mark.parametrize(("config", "kind", "window"), [
    (CASES["qwen2"], "qwen2", None),
    (LlamaConfig(**SMALL, attention_bias=True), "llama", None),
    (CASES["mistral"], "llama", 7),
], ids=["qwen2", "llama_with_biases", "mistral"])  # fmt: skip
def test_gguf(config, kind, window, tmp_path):
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    for key, parameter in theirs.named_parameters():
        if key.endswith("bias"):
            parameter.data.normal_()
    file, ids = write_gguf(tmp_path / "model.gguf", theirs, kind, window), tokens(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(load(file, quantize=None)(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0)


def test_gguf_that_does_not_say_which_layers_slide_is_refused(saved, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", saved("qwen2")[0], "qwen2", window=7)
    with pytest.raises(InputError, match="holds a qwen2 with a sliding window: expected none"):
        load(file)


@pytest.mark.parametrize("raw", [
    {"model_type": "mistral"},
    {"model_type": "mistral", "sliding_window": None},
    {"model_type": "qwen2"},
    {"model_type": "qwen2", "use_sliding_window": True},
    {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0, "sliding_window": 5},
    {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0},
    {"model_type": "llama", "sliding_window": 5},
], ids=str)  # fmt: skip
def test_absent_keys_mean_what_they_mean_to_transformers(raw):
    theirs = AutoConfig.for_model(**raw)
    sizes = {"vocab_size": 10, "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 32}
    ours = ours_module.LlamaConfig.from_dict(sizes | {"num_attention_heads": 32} | raw)
    for name in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    window = getattr(theirs, "sliding_window", None) if raw["model_type"] != "llama" else None
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 32
    wanted = [window if kind == "sliding_attention" else None for kind in kinds]
    assert [ours.window(layer) for layer in range(32)] == wanted


RELEASED = {
    "SOLAR-10.7B": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_scaling": None, "rope_theta": 10000.0, "pretraining_tp": 1, "attention_bias": False,
    },
    "TinyLlama-1.1B": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
        "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    },
    "Mistral-7B-v0.1": {
        "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    },
    "Qwen2-0.5B": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "sliding_window": 131072, "max_window_layers": 24, "use_sliding_window": False,
        "tie_word_embeddings": True, "attention_dropout": 0.0,
    },
}  # fmt: skip
"""What config.json says in these releases, but for the number of layers."""


@pytest.mark.parametrize("name", RELEASED)
def test_names_and_shapes_of_released_models(name):
    raw = RELEASED[name] | {"num_hidden_layers": 2}
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw))
        ours = ours_module.LlamaForCausalLM(ours_module.LlamaConfig.from_dict(raw))
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert ours.config.rope_theta == theirs.config.rope_parameters["rope_theta"]
    assert ours.config.window(1) == (4096 if "Mistral" in name else None)


def test_torch_compile_takes_windows_and_biases(saved):
    model, ids = load(saved("qwen2_some_layers_sliding")[1]), tokens(1, 20)
    compiled = torch.compile(model.model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), model.model(ids), atol=1e-5, rtol=1e-5)


BASE = {"model_type": "qwen2", "num_hidden_layers": 3}


@pytest.mark.parametrize(("raw", "message"), [
    ({"model_type": "gpt_neox"}, r"'gpt_neox', a GPT-NeoX, as Polyglot-Ko, .*: quantize .* jindo_core\.integrations"),
    ({"model_type": "qwen3"}, r"'qwen3', a Qwen3, whose queries and keys are normed, expected one of llama, "),
    ({"model_type": "gemma"}, r"model_type 'gemma', expected one of llama, .*mistral, qwen2 or falcon: "),
    ({"model_type": None}, "model_type None, expected one of"),
    ({"model_type": ["llama"]}, r"model_type \['llama'\], expected one of"),
    (BASE | {"hidden_act": "gelu"}, "hidden_act 'gelu', expected 'silu'"),
    (BASE | {"use_qk_norm": True}, "use_qk_norm True, expected False"),
    (BASE | {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5, expected 1"),
    (BASE | {"rope_parameters": {"partial_rotary_factor": 0.5}}, "turns parts of a head otherwise"),
    (BASE | {"rope_scaling": {"type": "default", "mrope_section": [4, 4]}}, "turns parts of a head otherwise"),
    (BASE | {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "for each kind of layer, expected one set"),
    (BASE | {"use_sliding_window": True, "sliding_window": 0}, "sliding_window = 0, expected a positive whole number"),
    (BASE | {"use_sliding_window": True, "sliding_window": 2.5}, "sliding_window = 2.5, expected a positive"),
    (BASE | {"use_sliding_window": "no"}, "use_sliding_window = 'no', expected true or false"),
    (BASE | {"use_sliding_window": True, "max_window_layers": "2"}, "max_window_layers = '2', expected a whole number"),
    (BASE | {"layer_types": ["full_attention"] * 2}, "2 layer_types, expected one for each of 3 layers"),
    (BASE | {"layer_types": ["chunked_attention"] * 3}, "expected a list of 'full_attention' and 'sliding_attention'"),
    (BASE | {"layer_types": SOME}, "among its layer_types but no sliding_window"),
    ({"model_type": "mistral", "num_hidden_layers": 3, "layer_types": SOME}, "a mistral with full_attention among"),
])  # fmt: skip
def test_what_would_be_computed_otherwise_is_refused(raw, message):
    with pytest.raises(InputError, match=message) as caught:
        as_llama(raw)
    assert "\n" not in str(caught.value)


def test_a_fault_is_said_to_be_in_the_file_that_has_it():
    with pytest.raises(InputError, match=r"^params\.json has hidden_act 'gelu'"):
        as_llama(BASE | {"hidden_act": "gelu"}, "params.json")
    with pytest.raises(InputError, match=r"^params\.json has vocab_size = None"):
        ours_module.LlamaConfig.from_dict(SMALL | {"model_type": "llama", "vocab_size": None}, "params.json")


def test_attention_dropout_is_left_out_aloud():
    with pytest.warns(UserWarning, match=r"attention_dropout 0\.1: attention is trained without dropout"):
        as_llama(BASE | {"attention_dropout": 0.1})
