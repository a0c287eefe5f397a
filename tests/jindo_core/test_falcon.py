"""Falcon against transformers and peft, in both layouts: logits, losses, gradients, padding, caching, text."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from torch import nn
from transformers import FalconConfig as TheirConfig
from transformers import FalconForCausalLM as Theirs

from jindo_core.adapters import load_adapter, save_adapter
from jindo_core.architectures import build, read_config
from jindo_core.causal_lm import KVCache
from jindo_core.decoding import Decoder, FixedStep
from jindo_core.errors import InputError
from jindo_core.falcon import FalconConfig, FalconForCausalLM
from jindo_core.generation import generate_ids
from jindo_core.loader import load_model
from jindo_core.lora import adapted_layers, attach_lora
from jindo_core.memory import Relief, sizes_of
from jindo_core.model import LlamaForCausalLM
from jindo_core.nf4 import NF4Linear
from jindo_core.paged_adamw import PagedAdamW
from jindo_core.recompute import CheckpointOffload
from jindo_core.streaming import LayerStream

BASE = {
    "model_type": "falcon", "vocab_size": 131, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6,
    "max_position_embeddings": 64, "eos_token_id": 1, "bos_token_id": 1,
}  # fmt: skip
GROUPED = {"new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": False}
LAYOUTS = {
    "7b": {"multi_query": True},
    "40b": GROUPED,
    "11b": GROUPED | {"num_ln_in_parallel_attn": 1, "rope_theta": 500042.0},
}
SHAPES = LAYOUTS | {
    "7b untied with biases": {"multi_query": True, "bias": True, "tie_word_embeddings": False},
    "40b tied with biases": GROUPED | {"bias": True, "tie_word_embeddings": True},
    "a key a head": {"multi_query": False},
    "40b, a key a head": {"new_decoder_architecture": True},
    "narrow MLP": {"ffn_hidden_size": 60, "layer_norm_epsilon": 1e-3},
}
TARGETS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
CPU = torch.device("cpu")
both_layouts = pytest.mark.parametrize("layout", ["7b", "40b"])


def their_model(shape):
    """transformers' model with random weights, biases and norms among them."""
    torch.manual_seed(0)
    theirs = Theirs(TheirConfig(**(BASE | SHAPES[shape]))).eval()
    for name, parameter in theirs.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float("bias" not in name), std=0.3)
        else:
            nn.init.normal_(parameter, std=0.15)
    return theirs


def pair(shape):
    """The same weights in both implementations."""
    theirs = their_model(shape)
    ours = build(read_config(theirs.config.to_dict())).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def random_ids(*shape):
    return torch.randint(0, 131, shape, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=["7b", "40b"])
def saved(request, tmp_path_factory):
    """A layout, and a random Falcon of it as transformers saves one."""
    path = tmp_path_factory.mktemp(request.param)
    their_model(request.param).save_pretrained(path)
    return request.param, path


def nf4_model(layout, dropout=0.0):
    """Quantized and adapted, its adapter not zero."""
    model, _ = pair(layout)
    for module in list(model.stack.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, NF4Linear.from_linear(child))
    attach_lora(model, r=4, alpha=8, dropout=dropout, target_modules="all-linear").train()
    with_random_adapter(model)
    return model


def with_random_adapter(model):
    torch.manual_seed(7)
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)


def step(model, ids):
    torch.manual_seed(5)
    loss = model(ids, labels=ids).loss
    return [loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


# --- the model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_logits(shape):
    ours, theirs = pair(shape)
    assert isinstance(ours, FalconForCausalLM)
    ids = random_ids(2, 23)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", LAYOUTS)
def test_loss_and_gradients_of_every_weight(shape):
    ours, theirs = pair(shape)
    ids = random_ids(2, 19)
    labels = ids.clone()
    labels[:, :5] = -100
    got, expected = ours.train()(ids, labels=labels), theirs.train()(ids, labels=labels)
    torch.testing.assert_close(got.loss, expected.loss)
    got.loss.backward()
    expected.loss.backward()
    for (name, mine), (same, their) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == same
        torch.testing.assert_close(mine.grad, their.grad, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@both_layouts
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_by_mask(layout, side):
    ours, theirs = pair(layout)
    ids = random_ids(3, 21)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 4, 13)):
        if padding:
            mask[row, slice(None, padding) if side == "left" else slice(-padding, None)] = 0
    real = mask.bool()
    got, expected = ours(ids, attention_mask=mask).logits, theirs(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[real], expected[real], atol=1e-4, rtol=0)
    assert got.isfinite().all()
    if side == "right":  # which needs no mask at all
        torch.testing.assert_close(ours(ids).logits[real], expected[real], atol=1e-4, rtol=0)


@both_layouts
def test_cache_in_pieces_equals_one_pass(layout):
    ours, _ = pair(layout)
    ids = random_ids(2, 16)
    cache = KVCache(ours.config, 2, 16, torch.float32, CPU)
    assert cache.keys.shape[2] == {"7b": 1, "40b": 2}[layout]
    pieces = [ours(part, cache=cache).logits for part in ids.split([9, 5, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), ours(ids).logits, atol=1e-4, rtol=0)


@both_layouts
def test_greedy_text(layout):
    ours, theirs = pair(layout)
    prompt = random_ids(1, 9)
    # Without a mask it takes the prompt's own 0s for padding.
    wanted = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=48, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )[0, 9:]  # fmt: skip
    assert len(set(wanted.tolist())) > 5, "else it says little"
    assert list(generate_ids(ours, prompt[0].tolist(), max_new_tokens=48)) == wanted.tolist()


@both_layouts
def test_the_fixed_step_of_a_gpu_graph(layout):
    """Its shapes never change: run here without the graph, beside the modules."""
    model = nf4_model(layout).eval()
    ids = random_ids(2, 12)
    caches = [KVCache(model.config, 2, 20, torch.float32, CPU) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model.stack(ids[:, :8], cache=cache)
        caches[0].keys[:, :, :, 8:], caches[0].values[:, :, :, 8:] = 0, 0
        fixed, decoder = FixedStep(model, caches[0], 20), Decoder(model, caches[1])
        for place in range(8, 12):
            fixed.tokens.copy_(ids[:, place])
            fixed.place.fill_(place)
            torch.testing.assert_close(fixed.run(), decoder(ids[:, place]), atol=1e-4, rtol=0)


# --- the adapter ----------------------------------------------------------------------------------------


def test_nf4_everywhere_but_the_head(saved):
    layout, folder = saved
    model = load_model(folder, dtype="fp32", device="cpu")
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert len(linears) == 3 * 4 + 1
    assert {path for path, module in linears.items() if not isinstance(module, NF4Linear)} == {"lm_head"}
    assert (model.lm_head.weight is model.transformer.word_embeddings.weight) == (layout == "7b")
    theirs = Theirs.from_pretrained(folder)
    for path, module in linears.items():
        if isinstance(module, NF4Linear):
            theirs.get_submodule(path).weight.data = module.nf4.dequantize(torch.float32)
    ids = random_ids(2, 17)
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0)


def test_loading_with_layers_on_the_host(saved):
    _, folder = saved
    whole = load_model(folder, dtype="fp32", device="cpu")
    model = load_model(folder, dtype="fp32", device="cpu", offload_layers=2, offload_embedding=True)
    assert model.stack.stream.layers == [0, 2]
    ids = random_ids(1, 15)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
    texts = [list(generate_ids(m, [3, 5, 7], max_new_tokens=12)) for m in (whole, model)]
    assert texts[0] == texts[1]


def test_gradients_equal_transformers_and_peft(saved):
    """Loss and the gradients of every A and B, on the dequantized weights."""
    _, folder = saved
    ours = attach_lora(load_model(folder, dtype="fp32", device="cpu"), r=4, alpha=8, target_modules="all-linear")
    with_random_adapter(ours)
    theirs = peft.get_peft_model(
        Theirs.from_pretrained(folder), peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    )
    assert len(list(adapted_layers(ours))) == 3 * 4
    for path, layer in adapted_layers(ours):
        their = theirs.base_model.model.get_submodule(path)
        with torch.no_grad():
            their.base_layer.weight.copy_(layer.base.nf4.dequantize(torch.float32))
            their.lora_A["default"].weight.copy_(layer.lora_A)
            their.lora_B["default"].weight.copy_(layer.lora_B)
    ids = random_ids(2, 40)
    labels = ids.clone()
    labels[:, :15] = -100
    got, expected = ours.train()(ids, labels=labels).loss, theirs.train()(ids, labels=labels).loss
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    got.backward()
    expected.backward()
    for path, layer in adapted_layers(ours):
        their = theirs.base_model.model.get_submodule(path)
        for mine, peer in ((layer.lora_A, their.lora_A), (layer.lora_B, their.lora_B)):
            assert mine.grad.abs().max() > 1e-4
            torch.testing.assert_close(
                mine.grad, peer["default"].weight.grad, rtol=1e-3, atol=1e-5, msg=lambda m, p=path: f"{p}: {m}"
            )


@pytest.mark.parametrize("targets", [TARGETS, ["query_key_value"], ["dense"]])
def test_an_adapter_goes_to_peft_and_back(saved, targets, tmp_path):
    _, folder = saved
    ours = attach_lora(
        load_model(folder, quantize=None, dtype="fp32", device="cpu"), r=4, alpha=8, target_modules=targets
    )
    with_random_adapter(ours)
    ids = random_ids(2, 11)
    wanted = ours(ids).logits
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(Theirs.from_pretrained(folder), tmp_path / "ours")
    torch.testing.assert_close(theirs(ids).logits, wanted, atol=1e-4, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_adapter(load_model(folder, quantize=None, dtype="fp32", device="cpu"), tmp_path / "theirs")
    assert len(list(adapted_layers(back))) == 3 * len(targets)
    assert torch.equal(back(ids).logits, wanted)


def test_the_usual_targets_are_peft_s():
    assert list(sizes_of(read_config(BASE)).usual_targets) == PEFT_TARGETS["falcon"]


def test_target_modules_that_no_falcon_has(saved):
    model = load_model(saved[1], dtype="fp32", device="cpu")
    with pytest.raises(InputError, match=r"\[q_proj, v_proj\] match no linear layer; this model has \[dense, dense_4h"):
        attach_lora(model, target_modules=("q_proj", "v_proj"))


# --- memory ---------------------------------------------------------------------------------------------


@both_layouts
@pytest.mark.parametrize("checkpointed", [0, 2, 3])
def test_checkpointing_and_streaming_give_the_same_bits(layout, checkpointed):
    model = nf4_model(layout, dropout=0.2)
    ids = random_ids(2, 17)
    wanted = step(model, ids)
    stack = model.stack
    stack.checkpointed_layers = checkpointed
    settings = [(None, []), (CheckpointOffload(), []), (CheckpointOffload(), [1]), (None, [0, 2])]
    for offload, streamed in settings:
        stack.checkpoint_offload = offload
        stack.stream = LayerStream(CPU) if streamed else None
        for number in streamed:
            stack.stream.take(number, stack.layers[number])
        for _ in range(2):
            for got, want in zip(step(model, ids), wanted, strict=True):
                assert torch.equal(got, want)
        if streamed:
            assert stack.stream.counters.bytes_in > 0
            stack.stream.restore()
    assert wanted[0].isfinite()


@both_layouts
def test_bf16_stays_near_fp32(layout):
    model = nf4_model(layout).eval()
    ids = random_ids(2, 17)
    with torch.no_grad():
        wanted = model(ids).logits
        got = model.to(torch.bfloat16)(ids).logits
    assert got.dtype == model.dtype == torch.bfloat16
    error = (got.float() - wanted).norm() / wanted.norm()
    assert 1e-5 < error < 0.05


def test_relief_ends(saved):
    """What gives way when a step runs out of memory."""
    model = attach_lora(load_model(saved[1], dtype="fp32", device="cpu"), r=4, target_modules="all-linear").train()
    optimizer = PagedAdamW([p for p in model.parameters() if p.requires_grad])
    relief = Relief(model, optimizer, 2)
    said = []
    while (done := relief.give_way()) is not None:
        said.append(done)
    # A smaller batch, checkpoints, those to the host, the head, the layers one by one; the embedding is on the CPU.
    assert len(said) == 7, said
    assert model.stack.stream.layers == [0, 1, 2]
    step(model, random_ids(1, 9))


@both_layouts
def test_torch_compile(layout):
    model = nf4_model(layout).eval()
    ids = random_ids(1, 12)
    compiled = torch.compile(model.stack, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), model.stack(ids), atol=1e-5, rtol=1e-5)


# --- the configuration ----------------------------------------------------------------------------------


def test_the_first_releases_own_configurations():
    """config.json as tiiuae published it before transformers knew the model."""
    seven = {
        "model_type": "RefinedWebModel", "vocab_size": 65024, "hidden_size": 4544, "n_head": 71, "n_layer": 32,
        "multi_query": True, "parallel_attn": True, "alibi": False, "bias": False, "hidden_dropout": 0.0,
        "attention_dropout": 0.0, "layer_norm_epsilon": 1e-05, "eos_token_id": 11, "apply_residual_connection": False,
    }  # fmt: skip
    config = read_config(seven)
    assert isinstance(config, FalconConfig)
    assert (config.num_key_value_heads, config.norms, config.head_dim) == (1, 1, 64)
    assert (config.ffn_hidden_size, config.max_position_embeddings, config.eos_token_ids) == (18176, 2048, (11,))
    assert config.tie_word_embeddings
    forty = seven | {"model_type": "RefinedWeb", "hidden_size": 8192, "n_head": 128, "n_head_kv": 8, "n_layer": 60}
    del forty["multi_query"]
    config = read_config(forty)
    assert (config.num_key_value_heads, config.norms, config.head_dim) == (8, 2, 64)
    with torch.device("meta"):
        model = build(config)
    assert model.stack.layers[59].self_attention.query_key_value.weight.shape == (9216, 8192)
    assert sum(p.numel() for p in model.parameters()) == 41_303_293_952


def test_each_configuration_gets_its_own_model():
    llama = {"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    assert isinstance(build(read_config(llama | {"num_attention_heads": 2})), LlamaForCausalLM)
    assert isinstance(build(read_config(BASE)), FalconForCausalLM)
    with pytest.raises(InputError, match=r"model_type 'gpt_neox'.* or falcon"):
        read_config({"model_type": "gpt_neox"})


@pytest.mark.parametrize(("changes", "message"), [
    ({"alibi": True}, r"alibi = true \(Falcon-RW\)"),
    ({"parallel_attn": False}, "parallel_attn = false"),
    ({"activation": "relu"}, "activation 'relu', expected 'gelu'"),
    ({"hidden_dropout": 0.1}, r"hidden_dropout = 0\.1, expected 0"),
    ({"num_attention_heads": 7}, "hidden_size 96 and 7 heads"),
    ({"num_attention_heads": 32}, "hidden_size 96 and 32 heads"),
    ({"new_decoder_architecture": True, "num_kv_heads": 4}, "6 heads and 4 key/value heads"),
    ({"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn = 2, expected 1"),
    ({"new_decoder_architecture": "yes"}, "new_decoder_architecture = 'yes', expected true or false"),
    ({"hidden_size": None}, "hidden_size = None, expected a positive whole number"),
    ({"vocab_size": True}, "vocab_size = True, expected a positive whole number"),
    ({"layer_norm_epsilon": "x"}, "layer_norm_epsilon = 'x', expected a positive number"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear', expected 'default'"),
    ({"rope_parameters": [1]}, r"RoPE parameters \[1\], expected an object"),
    ({"rope_parameters": {"rope_theta": -1}}, "rope_theta = -1, expected a positive number"),
    ({"eos_token_id": "x"}, "eos_token_id = 'x', expected a token id"),
    ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon = nan, expected a positive number"),
    ({"rope_theta": float("inf")}, "rope_theta = inf, expected a positive number"),
    ({"rope_theta": 1e-300}, "rope_theta 1e-300: expected what gives finite angles"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000, expected at most 65536"),
])  # fmt: skip
def test_a_config_that_can_not_be_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        read_config(BASE | changes)
