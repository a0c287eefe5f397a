"""Losses of answers as transformers', with the prompt and without."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from jindo_core.data.examples import IGNORE, Example
from jindo_core.errors import InputError
from jindo_core.head import StreamedHead
from jindo_core.loader import load_model
from jindo_core.scoring import Score, answer_losses, score
from jindo_core.tokenizer import load_tokenizer

ROWS = [
    ("Once upon a time", " there was a little girl named Lily. She loved to play outside."),
    ("Tell a story.\n", "No."),
    ("One day, Tom and his dog went to the", " big park near the lake to play with a red ball and a kite."),
]


def encoded(tokenizer, prompt, answer):
    ids = [*tokenizer.encode(prompt), *tokenizer.encode(answer, bos=False), tokenizer.eos_id]
    masked = len(tokenizer.encode(prompt))
    return Example(ids, [IGNORE] * masked + ids[masked:])


@pytest.fixture(scope="module")
def story(stories15m):
    tokenizer = load_tokenizer(stories15m)
    examples = [encoded(tokenizer, *row) for row in ROWS]
    # A conversation: the second answer stands alone by itself too.
    both = Example(
        examples[0].input_ids + examples[2].input_ids, examples[0].labels + examples[2].labels
    )
    return load_model(stories15m, quantize=None, dtype="fp32", device="cpu"), tokenizer, [*examples, both]


@pytest.fixture(scope="module")
def theirs(stories15m):
    peer = AutoModelForCausalLM.from_pretrained(stories15m, dtype=torch.float32)

    def loss(example):
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        with torch.no_grad():
            return peer(ids, labels=labels).loss.item()

    return loss


@pytest.mark.parametrize("batch_size", [1, 3])
def test_losses_equal_transformers(story, theirs, batch_size):
    model, tokenizer, examples = story
    scores = score(model, tokenizer, examples, batch_size=batch_size)
    for example, found in zip(examples, scores, strict=True):
        expected = theirs(example)
        assert found.loss == pytest.approx(expected, rel=1e-5)
        assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
        assert found.tokens == sum(label != IGNORE for label in example.labels)
    for example, found in zip(examples[:3], scores[:3], strict=True):
        answer = [label for label in example.labels if label != IGNORE]
        alone = theirs(Example([tokenizer.bos_id, *answer], [IGNORE, *answer]))
        assert found.loss_alone == pytest.approx(alone, rel=1e-5)
        assert found.ifd == pytest.approx(theirs(example) / alone, rel=1e-5)
    parts = [scores[i].loss_alone * scores[i].tokens for i in (0, 2)]
    assert scores[3].loss_alone * scores[3].tokens == pytest.approx(sum(parts), rel=1e-5)
    assert not model.training


@pytest.mark.slow
def test_smollm2_without_bos_of_its_own(smollm2_gguf):
    """It adds no BOS before a row; an answer alone still begins behind one."""
    model, tokenizer = load_model(smollm2_gguf, quantize=None, dtype="fp32", device="cpu"), load_tokenizer(smollm2_gguf)
    assert not tokenizer.adds_bos
    peer = AutoModelForCausalLM.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32)
    example = encoded(tokenizer, "한국의 수도는 ", "서울입니다.")
    found = score(model, tokenizer, [example], batch_size=1)[0]
    answer = [label for label in example.labels if label != IGNORE]
    for one, ours in (
        (example, found.loss),
        (Example([tokenizer.bos_id, *answer], [IGNORE, *answer]), found.loss_alone),
    ):
        with torch.no_grad():
            loss = peer(torch.tensor([one.input_ids]), labels=torch.tensor([one.labels])).loss.item()
        assert ours == pytest.approx(loss, rel=1e-4)


def test_a_streamed_head_scores_the_same(story):
    model, _, examples = story
    head = model.lm_head
    expected = answer_losses(model, examples, batch_size=2, pad_id=0)
    model.lm_head = StreamedHead(head.weight.detach(), model.device)
    try:
        found = answer_losses(model, examples, batch_size=2, pad_id=0)
    finally:
        model.lm_head = head
    assert [count for _, count in found] == [count for _, count in expected]
    for ours, whole in zip(found, expected, strict=True):
        assert ours[0] == pytest.approx(whole[0], rel=1e-5)


def test_the_first_token_of_a_row_is_not_counted(story):
    model, tokenizer, _ = story
    ids = tokenizer.encode("Once upon a time")
    found = score(model, tokenizer, [Example(ids, ids)], batch_size=1)[0]
    assert found.tokens == len(ids) - 1
    assert found.ifd == pytest.approx(1.0)  # nothing stood before BOS either


def test_numbers_at_the_edge(story, monkeypatch):
    assert Score(3, 0.0, 0.0).ifd == 1.0
    assert Score(3, 1.0, 0.0).ifd == math.inf
    assert Score(3, 1e4, 1.0).perplexity == math.inf
    model, tokenizer, examples = story
    assert score(model, tokenizer, [], batch_size=4) == []
    monkeypatch.setattr(tokenizer, "bos_id", None)
    monkeypatch.setattr(tokenizer, "eos_id", None)
    with pytest.raises(InputError, match="neither BOS nor EOS"):
        score(model, tokenizer, examples, batch_size=1)
