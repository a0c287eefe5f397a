"""A head outside the device: the same loss, gradients and text as one that is on it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from jindo_core import head
from jindo_core.generation import generate
from jindo_core.head import StreamedHead
from jindo_core.kernels.linear_cross_entropy import linear_cross_entropy
from jindo_core.loader import load_model
from jindo_core.lora import attach_lora
from jindo_core.tokenizer import load_tokenizer


@pytest.fixture
def small_slices(monkeypatch):
    monkeypatch.setattr(head, "SLICE_BYTES", 10_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["host", "folder"])
def test_the_loss_is_that_of_the_whole_head(dtype, place, small_slices, tmp_path):
    torch.manual_seed(0)
    weight, x = torch.randn(1003, 64).mul_(0.2).to(dtype), torch.randn(37, 64).to(dtype)
    labels = torch.randint(0, 1003, (37,))
    labels[::5] = -100
    labels[1], labels[2] = 0, 1002  # the first row and the last
    streamed = StreamedHead(weight, torch.device("cpu"), "host" if place == "host" else tmp_path)
    assert -(-1003 // streamed.slice_rows) > 5
    found, gradients = [], []
    for run in (lambda h: streamed.loss(h, labels), lambda h: linear_cross_entropy(h, weight, labels)):
        hidden = x.clone().requires_grad_()
        loss = run(hidden)
        (3 * loss).backward()
        found.append(loss.detach())
        gradients.append(hidden.grad.float())
    exact = x.double().requires_grad_()
    (3 * nn.functional.cross_entropy(exact @ weight.double().t(), labels)).backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found[0], found[1], rtol=tolerance, atol=tolerance)
    scale = exact.grad.abs().max().item()
    for gradient in gradients:
        assert (gradient - exact.grad).abs().max() <= tolerance * scale
    assert not gradients[0][::5].any(), "rows that do not count"


def test_rows_beyond_a_chunk_and_no_counted_row(small_slices, monkeypatch):
    from jindo_core.kernels import linear_cross_entropy as operator

    monkeypatch.setattr(operator, "_CHUNK_LOGITS", 100)
    weight, x, labels = torch.randn(50, 8), torch.randn(40, 8), torch.arange(40)
    streamed = StreamedHead(weight, torch.device("cpu"))
    torch.testing.assert_close(streamed.loss(x, labels), nn.functional.cross_entropy(x @ weight.t(), labels))
    assert streamed.loss(x, torch.full((40,), -100)).isnan(), "as torch's cross entropy"
    with pytest.raises(ValueError, match=r"expected \[40\] in torch.int64"):
        streamed.loss(x, labels.int())


def test_a_model_with_its_head_on_the_host(stories15m, monkeypatch):
    """Tied: embedding and head are both away, and the text and the adapter's gradients stay what they were."""
    monkeypatch.setattr(head, "SLICE_BYTES", 4 << 20)  # nine slices
    ids = torch.randint(0, 32000, (2, 24), generator=torch.Generator().manual_seed(1))
    tokenizer, found = load_tokenizer(stories15m), []
    for offload in (False, True):
        model = load_model(stories15m, dtype="fp32", device="cpu", offload_head=offload)
        assert isinstance(model.lm_head, StreamedHead) == offload
        assert model.lm_head.weight.is_meta == offload
        text = generate(model, tokenizer, "Once upon a time", max_new_tokens=12)
        torch.manual_seed(0)
        attach_lora(model, r=4).train()
        output = model(ids, labels=ids)
        output.loss.backward()
        with torch.no_grad():
            logits = output.logits
        found.append((text, output.loss.item(), [p.grad for p in model.parameters() if p.grad is not None], logits))
    (text, loss, gradients, logits), (other_text, other_loss, other_gradients, other_logits) = found
    assert text == other_text
    assert other_loss == pytest.approx(loss, rel=1e-6)
    for one, other in zip(gradients, other_gradients, strict=True):
        assert (one - other).abs().max() <= 1e-4 * one.abs().max()
    torch.testing.assert_close(logits, other_logits, rtol=1e-5, atol=1e-5)


def test_logits_are_there_with_gradients_enabled(stories15m):
    """As `CausalLMOutput` says: without a gradient of their own, and the loss keeps its."""
    ids = torch.arange(100, 120)[None]
    model = attach_lora(load_model(stories15m, dtype="fp32", device="cpu", offload_head=True), r=4).train()
    for output in (model(ids), model(ids, labels=ids)):
        assert not output.logits.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(output.logits, model(ids).logits)
    assert output.loss.requires_grad
    output.loss.backward()
    grads = [value.grad for name, value in model.named_parameters() if name.endswith("lora_B")]
    assert all(bool(grad.any()) for grad in grads)


def test_its_state_is_the_weight_itself(small_slices):
    weight = torch.randn(1003, 8)
    one, other = (StreamedHead(value, torch.device("cpu")) for value in (weight, torch.zeros(1003, 8)))
    state = nn.Sequential(one).state_dict()
    assert torch.equal(state["0.weight"], weight)
    x = torch.randn(3, 8)
    assert not other(x).any(), "its first slice is in a buffer now"
    nn.Sequential(other).load_state_dict(state)
    assert torch.equal(other(x), one(x))
    assert torch.equal(other.whole(), weight)
    with pytest.raises(RuntimeError, match="Missing key"):
        nn.Sequential(other).load_state_dict({})
    with pytest.raises(RuntimeError, match=r"0\.weight is \(2, 8\), expected \(1003, 8\)"):
        nn.Sequential(other).load_state_dict({"0.weight": torch.zeros(2, 8)})
    with pytest.raises(ValueError, match=r"got \(2, 8\)"):
        other.write(torch.zeros(2, 8))


def test_its_logits_give_no_gradient(small_slices):
    streamed = StreamedHead(torch.randn(50, 8), torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"its logits need torch\.no_grad"):
        streamed(torch.randn(2, 8, requires_grad=True))
