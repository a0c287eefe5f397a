"""Log-probabilities of continuations against transformers' own logits."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from jindo_core import likelihood
from jindo_core.errors import InputError
from jindo_core.likelihood import Request, Score, batches, encode_request, score, token_log_probabilities
from jindo_core.loader import load_model
from jindo_core.lora import attach_lora
from jindo_core.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def model(stories260k):
    return load_model(stories260k, quantize=None, dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def theirs(stories260k):
    return AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float32).eval()


def requests_of(count, longest=40, seed=0):
    drawn = random.Random(seed)

    def ids(most):
        return tuple(drawn.randrange(3, 512) for _ in range(drawn.randint(1, most)))

    return [Request(ids(longest), ids(6)) for _ in range(count)]


@torch.no_grad()
def their_score(theirs, request, limit=512):
    ids = (request.context + request.continuation)[-limit - 1 :]
    logs = theirs(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)[-len(request.continuation) :]
    wanted = torch.tensor(request.continuation)
    return float(logs.gather(1, wanted[:, None]).sum()), bool((logs.argmax(1) == wanted).all())


def greedy_continuation(theirs, context, count):
    ids = list(context)
    for _ in range(count):
        ids.append(int(theirs(torch.tensor([ids])).logits[0, -1].argmax()))
    return Request(tuple(context), tuple(ids[len(context) :]))


def test_scores_are_transformers_own(model, theirs):
    likeliest = greedy_continuation(theirs, (1, 403, 407), 4)
    asked = [*requests_of(20), likeliest, Request((7,), (9,))]
    found: dict[int, Score] = {}
    for batch in batches(asked, 4, model):
        found.update(zip(batch, score(model, [asked[i] for i in batch], pad_id=0), strict=True))
    assert found.keys() == set(range(len(asked)))
    for i, request in enumerate(asked):
        total, greedy = their_score(theirs, request)
        assert found[i].log_probability == pytest.approx(total, abs=1e-4)
        assert found[i].greedy == greedy
    assert found[20].greedy


def test_the_logits_are_never_whole(model, monkeypatch):
    asked = requests_of(9)
    whole = score(model, asked, pad_id=0)
    monkeypatch.setattr(likelihood, "chunk_rows", lambda vocab_size: 3)
    parts = score(model, asked, pad_id=0)
    assert [one.greedy for one in parts] == [one.greedy for one in whole]
    assert [one.log_probability for one in parts] == pytest.approx([one.log_probability for one in whole], abs=1e-4)


def test_a_streamed_head_gives_the_same(stories260k, model, monkeypatch):
    monkeypatch.setattr("jindo_core.head.SLICE_BYTES", 100 * 64 * 4)  # six slices of at most 100 rows
    streamed = load_model(stories260k, quantize=None, dtype="fp32", device="cpu", offload_head=True)
    assert streamed.lm_head.slice_rows == 100
    asked = requests_of(9)
    for ours, whole in zip(score(streamed, asked, pad_id=0), score(model, asked, pad_id=0), strict=True):
        assert ours.log_probability == pytest.approx(whole.log_probability, abs=1e-4)
        assert ours.greedy == whole.greedy


def test_of_equal_logits_the_smaller_id_is_the_likeliest():
    head = torch.nn.Linear(2, 6, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0, 0], [1, 0], [1, 0], [0, 0], [1, 0], [0, 0]]))
    log, likeliest = token_log_probabilities(torch.tensor([[1.0, 0]] * 3), head, torch.tensor([1, 2, 4]))
    assert log.tolist() == pytest.approx([1 - torch.tensor([0.0, 1, 1, 0, 1, 0]).logsumexp(0).item()] * 3)
    assert likeliest.tolist() == [True, False, False]


def test_inputs_that_differ_in_the_last_token_alone_run_once(model, theirs, monkeypatch):
    context = tuple(range(10, 30))
    asked = [Request(context, (token,)) for token in (3, 4, 5, 6)] + [Request(context[:-1], (context[-1], 7))]
    assert batches(asked, 2, model) == [[0, 1, 2, 3, 4]]  # one input, whoever its last token belongs to
    rows = []
    monkeypatch.setattr(type(model.stack), "forward", _counting(type(model.stack).forward, rows))
    found = score(model, asked, pad_id=0)
    assert rows == [1]
    for request, one in zip(asked, found, strict=True):
        assert one.log_probability == pytest.approx(their_score(theirs, request)[0], abs=1e-4)


def _counting(forward, rows):
    def counted(self, input_ids, *rest, **more):
        rows.append(len(input_ids))
        return forward(self, input_ids, *rest, **more)

    return counted


def test_what_exceeds_the_context_loses_its_beginning(model, theirs):
    long = Request(tuple(range(3, 500)) * 2, (5, 6, 7))
    (ours,) = score(model, [long], pad_id=0)
    assert ours.log_probability == pytest.approx(their_score(theirs, long)[0], abs=1e-4)
    with pytest.raises(InputError, match="a continuation has 513 tokens, the model's context 512"):
        batches([Request((1,), (5,) * 513)], 1, model)


def test_batches_are_the_longest_first_and_always_the_same(model):
    asked = requests_of(30)
    found = batches(asked, 4, model)
    assert sorted(i for batch in found for i in batch) == list(range(30))
    lengths = [len(asked[i]) for batch in found for i in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert found == batches(asked, 4, model)


def test_a_model_to_which_padding_tells_gets_none(model, monkeypatch):
    asked = requests_of(30)
    wanted = score(model, asked, pad_id=0)
    monkeypatch.setattr(likelihood, "depends_on_padding", lambda model: True)
    found = batches(asked, 4, model)
    assert all(len({len(asked[i]) for i in batch}) == 1 for batch in found)
    assert max(map(len, found)) > 1
    read, forward = [], type(model.stack).forward

    def watched(self, input_ids, *rest, **more):
        read.append(tuple(input_ids.shape))
        return forward(self, input_ids, *rest, **more)

    monkeypatch.setattr(type(model.stack), "forward", watched)
    apart = score(model, asked, pad_id=0)  # windows of a text come without `batches`
    assert sorted(length for _, length in read) == sorted({len(request) - 1 for request in asked})
    assert sum(count for count, _ in read) == 30
    assert [one.log_probability for one in apart] == pytest.approx([one.log_probability for one in wanted], abs=1e-4)


def test_a_batch_that_does_not_fit_is_halved(model, monkeypatch):
    asked = requests_of(5)
    wanted = score(model, asked, pad_id=0)
    forward, sizes = type(model.stack).forward, []

    def tight(self, input_ids, *rest, **more):
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, input_ids, *rest, **more)

    monkeypatch.setattr(type(model.stack), "forward", tight)
    found = score(model, asked, pad_id=0)
    assert sizes == [5, 2, 3, 1, 2]
    assert [one.log_probability for one in found] == pytest.approx([one.log_probability for one in wanted], abs=1e-4)
    monkeypatch.setattr(type(model.stack), "forward", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("other")))
    with pytest.raises(RuntimeError, match="other"):
        score(model, asked, pad_id=0)


def test_dropout_is_off_and_the_mode_is_kept(stories260k):
    model = load_model(stories260k, quantize=None, dtype="fp32", device="cpu")
    attach_lora(model, r=2, alpha=64, dropout=0.5)
    for _, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    model.train()
    asked = requests_of(4)
    assert score(model, asked, pad_id=0) == score(model, asked, pad_id=0)
    assert model.training


def test_a_pair_is_parted_where_the_context_ends(stories260k, smollm2_gguf):
    for tokenizer in (load_tokenizer(stories260k), load_tokenizer(smollm2_gguf)):
        request = encode_request(tokenizer, "The answer is  ", "yes")
        assert list(request.context) == tokenizer.encode("The answer is")
        # Spaces at the context's end belong to the continuation.
        assert list(request.context + request.continuation) == tokenizer.encode("The answer is  yes")
        empty = encode_request(tokenizer, "", "yes")
        assert empty.context == (tokenizer.bos_id,)
        assert list(empty.continuation) == tokenizer.encode("yes", bos=False)
        with pytest.raises(InputError, match="has no token of its own"):
            encode_request(tokenizer, "The answer", "")
