"""Documents packed into one sequence: losses and gradients as of each document in a row of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import MistralConfig, Qwen2Config

from jindo_core.architectures import build, read_config
from jindo_core.loader import load_model
from jindo_core.lora import attach_lora
from jindo_core.nf4 import NF4Linear
from jindo_core.recompute import CheckpointOffload
from jindo_core.streaming import LayerStream

BASE = {"vocab_size": 131, "num_hidden_layers": 3, "max_position_embeddings": 64}
LLAMA = BASE | {"hidden_size": 72, "intermediate_size": 100, "num_attention_heads": 9, "num_key_value_heads": 3}
EVEN = BASE | {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "smollm2": LLAMA | {"model_type": "llama", "rope_theta": 1e5, "tie_word_embeddings": True},
    "mistral": MistralConfig(**EVEN, sliding_window=5).to_dict(),
    "qwen2": Qwen2Config(**EVEN, use_sliding_window=True, sliding_window=6, max_window_layers=1).to_dict(),
    "falcon 7b": BASE | {"model_type": "falcon", "hidden_size": 96, "num_attention_heads": 6, "multi_query": True},
    "falcon 40b": BASE
    | {
        "model_type": "falcon", "hidden_size": 96, "num_attention_heads": 6, "new_decoder_architecture": True,
        "num_kv_heads": 2,
    },
}  # fmt: skip
PACKS = [(9, 1, 14), (3, 21), (24,), (7, 8, 4, 5)]


def make(config):
    torch.manual_seed(0)
    model = build(read_config(config))
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1 and "bias" not in name), std=0.15)
    return model.train()


def alone(packs, vocab=131):
    """Random documents, with nothing counted in their first third."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in (n for lengths in packs for n in lengths):
        ids = torch.randint(3, vocab, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 3] = -100
        rows.append((ids, labels))
    return rows


def gradients(model, calls):
    """The loss over several calls, and the gradients of all that takes them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    counted = sum(int((labels[:, 1:] != -100).sum()) for _, labels, _ in calls[1])
    total = 0.0
    for ids, labels, documents in calls[0]:
        loss = model(ids, labels=labels, num_items_in_batch=counted, documents=documents).loss
        total += loss.item()
        loss.backward()
    found = [p.grad.clone() for p in trained]
    model.zero_grad()
    return total, found


def hold(model, packed_model=None, vocab=131):
    """Packed as unpacked: a call with the packs beside a padded batch of the same documents."""
    rows = alone(PACKS, vocab)
    ids, labels = (torch.cat(parts).view(len(PACKS), -1) for parts in zip(*rows, strict=True))
    packed = [(ids, labels, PACKS)]
    longest = max(len(ids) for ids, _ in rows)
    padded = [torch.stack([nn.functional.pad(x, (0, longest - len(x)), value=fill) for x in part])
              for part, fill in zip(zip(*rows, strict=True), (0, -100), strict=True)]  # fmt: skip
    unpacked = [(*padded, None)]
    expected, wanted = gradients(model, (unpacked, unpacked))
    got, found = gradients(packed_model or model, (packed, unpacked))
    assert got == pytest.approx(expected, rel=1e-5)
    assert len(found) == len(wanted) > 0
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * max(theirs.abs().max().item(), 1.0)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_the_unpacked_ones(name):
    hold(make(CONFIGS[name]))


def test_a_trained_model(stories260k):
    hold(load_model(stories260k, quantize="none", dtype="fp32", device="cpu").requires_grad_(True).train(), vocab=512)


def adapted(name):
    """NF4 and LoRA on every linear layer."""
    model = make(CONFIGS[name])
    for module in list(model.stack.layers.modules()):
        for key, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, key, NF4Linear.from_linear(child))
    model.requires_grad_(False)
    attach_lora(model, r=4, alpha=8, dropout=0.0, target_modules="all-linear").train()
    for key, parameter in model.named_parameters():
        if key.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("how", ["plain", "checkpointed", "offloaded", "streamed"])
@pytest.mark.parametrize("name", ["smollm2", "mistral", "falcon 40b"])
def test_adapters_on_nf4_however_layers_run(name, how, tmp_path):
    model, other = adapted(name), adapted(name)
    if how in ("checkpointed", "offloaded"):
        other.stack.gradient_checkpointing = True
    if how == "offloaded":
        other.stack.checkpoint_offload = CheckpointOffload(str(tmp_path))
    if how == "streamed":
        other.stack.stream = LayerStream(torch.device("cpu"), str(tmp_path))
        other.stack.stream.take(1, other.stack.layers[1])
    hold(model, other)


def test_nothing_foretells_the_next_documents_first_token():
    model = make(CONFIGS["smollm2"])
    ids = torch.randint(3, 131, (2, 12), generator=torch.Generator().manual_seed(0))
    documents = [(5, 7), (12,)]
    loss = model(ids, labels=ids, documents=documents).loss
    labels = ids.clone()
    labels[0, 5] = -100
    assert torch.equal(loss, model(ids, labels=labels, documents=documents).loss)
    other = ids.clone()
    other[0, :5] = 7  # what comes before a document changes nothing in it
    logits = [model(x, documents=documents).logits for x in (ids, other)]
    assert torch.equal(logits[0][0, 5:], logits[1][0, 5:])
    assert torch.equal(logits[0][1], logits[1][1])


def test_calls_that_can_not_be():
    model = make(CONFIGS["smollm2"])
    ids = torch.zeros(2, 8, dtype=torch.int64)
    for documents in ([(8,)], [(8,), (4, 3)], [(8,), (9,)]):
        with pytest.raises(ValueError, match="expected, for each of 2 sequences, lengths that add up to 8"):
            model(ids, documents=documents)
    with pytest.raises(ValueError, match="expected no attention_mask, position_ids or cache"):
        model(ids, torch.ones_like(ids), documents=[(8,), (8,)])


def test_a_longllama_takes_none():
    memory = {"mem_layers": [1], "last_context_length": 16}
    model = make(CONFIGS["smollm2"] | {"model_type": "longllama"} | memory)
    with pytest.raises(ValueError, match="a LongLLaMA reads its input in windows: expected no documents"):
        model(torch.zeros(1, 8, dtype=torch.int64), documents=[(4, 4)])


def test_calls_without_documents_still_compile():
    model = make(CONFIGS["smollm2"]).eval()
    ids = torch.randint(3, 131, (1, 9), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model.stack, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids), model.stack(ids), atol=1e-5, rtol=1e-5)
        packed = compiled(ids, documents=[(4, 5)])
        torch.testing.assert_close(packed, model.stack(ids, documents=[(4, 5)]), atol=1e-5, rtol=1e-5)
