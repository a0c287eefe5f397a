"""Answers to a file's rows: those of transformers and of `generate`, and what is counted of them."""

from __future__ import annotations

import pytest
import torch

from jindo_core import predictions
from jindo_core.data.examples import end_ids, prompt_ids
from jindo_core.data.records import Record, Round
from jindo_core.data.templates import load_template
from jindo_core.generation import generate, stop_ids
from jindo_core.loader import load_model
from jindo_core.predictions import Prediction, Question, Sampling
from jindo_core.tokenizer import load_tokenizer

ROWS = [
    Record.single("Tell me a story about a dog who lives near the big lake.", "", "Once there was a dog."),
    Record.single("Go on", "One day, Lily"),
    Record.single("숫자를 세어 줘.", "하나, 둘", "셋"),
    Record((Round("Hello.", "", "Hi!"), Round("Who is there?", "", "Tom."))),
    Record.single("Why?"),
]


@pytest.fixture(scope="module")
def parts(stories15m):
    tokenizer = load_tokenizer(stories15m)
    return load_model(stories15m, quantize=None, dtype="fp32", device="cpu"), tokenizer, load_template("alpaca_short")


def answered(parts, questions, sampling, size=3):
    model, tokenizer, template = parts
    order = predictions.batches(questions, size, model.config.context)
    found = {}
    for batch in order:
        rows = predictions.answer(model, tokenizer, template, sampling, [questions[i] for i in batch])
        found.update(zip(batch, rows, strict=True))
    return [predictions.read(one, found.get(i), tokenizer) for i, one in enumerate(questions)]


def test_greedy_answers_are_transformers_and_generates(parts, stories15m):
    from transformers import AutoModelForCausalLM

    model, tokenizer, template = parts
    theirs = AutoModelForCausalLM.from_pretrained(stories15m, dtype=torch.float32)
    questions = predictions.ask(enumerate(ROWS, 1), tokenizer, template)
    told = answered(parts, questions, Sampling(max_new_tokens=24))
    stops = sorted(stop_ids(model, tokenizer) | end_ids(tokenizer, template))
    for record, one in zip(ROWS, told, strict=True):
        ids = torch.tensor([prompt_ids(tokenizer, template, record)])
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=stops,
            pad_token_id=0,
        )[0, ids.shape[1] :].tolist()  # fmt: skip
        assert one.text == tokenizer.decode(out)
        assert one.ended == ("end" if out[-1] in stops else "length")
        assert one.tokens == len([token for token in out if token not in stops])
        alone = generate(
            model, tokenizer, ids[0].tolist(), max_new_tokens=24, ends=end_ids(tokenizer, template)
        )
        assert one.text == alone
    assert len({one.text for one in told}) == len(ROWS)


def test_draws_are_a_row_s_own(parts):
    _, tokenizer, template = parts
    sampled = Sampling(max_new_tokens=8, temperature=1.0, top_k=20, top_p=0.9, seed=3)
    questions = predictions.ask(enumerate([ROWS[1]] * 3, 1), tokenizer, template)
    told = answered(parts, questions, sampled)
    assert len({one.text for one in told}) > 1, "rows alike in all but their number"
    assert answered(parts, questions, sampled, size=1) == told
    assert answered(parts, questions[2:], sampled) == told[2:]
    other = Sampling(max_new_tokens=8, temperature=1.0, top_k=20, top_p=0.9, seed=4)
    assert answered(parts, questions, other) != told


def test_an_answer_ends_where_the_template_says_so(parts):
    model, tokenizer, template = parts
    (question,) = predictions.ask([(1, ROWS[1])], tokenizer, template)
    (whole,) = predictions.answer(model, tokenizer, template, Sampling(max_new_tokens=9), [question])
    assert whole[0] == 0
    stop = whole[4]
    own = model.config.eos_token_ids
    object.__setattr__(model.config, "eos_token_ids", (stop,))
    try:
        (short,) = predictions.answer(model, tokenizer, template, Sampling(max_new_tokens=9), [question])
    finally:
        object.__setattr__(model.config, "eos_token_ids", own)
    assert short == [1, *whole[1 : whole.index(stop, 1)]]
    assert predictions.read(question, short, tokenizer).ended == "end"


def test_the_last_answer_is_asked_for_and_the_others_are_told(parts):
    _, tokenizer, template = parts
    (question,) = predictions.ask([(1, ROWS[3])], tokenizer, template)
    prompt = tokenizer.decode(question.ids)
    assert "Hi!" in prompt
    assert prompt.rstrip().endswith("### Response:")
    assert "Tom." not in prompt
    assert question.reference == "Tom."
    assert [one.reference for one in predictions.ask([(1, ROWS[1])], tokenizer, template)] == [None]


def test_rows_that_can_not_be_answered_count_as_wrong(parts):
    model, _, _ = parts
    full = Question(1, ROWS[0], (5,) * model.config.context)
    none, fits = Question(2, ROWS[0], ()), Question(3, ROWS[0], (5,) * (model.config.context - 1))
    assert predictions.batches([full, none, fits], 4, model.config.context) == [[2]]
    assert predictions.batches([none, fits, full], 1, None) == [[2], [1]]
    told = answered(parts, [full, none, fits], Sampling(max_new_tokens=9))
    assert [(one.ended, one.tokens) for one in told[:2]] == [("no room", 0), ("no prompt", 0)]
    assert (told[2].ended, told[2].tokens) == ("length", 1)
    figures = predictions.measures(["", "x", told[2].text], told)
    assert (figures["unanswered"], figures["n"], figures["mean_tokens"]) == (2, 3, 1 / 3)


def test_figures_by_hand():
    """chrF: "abc" beside "abd" has 2 of 3 characters, 1 of 2 pairs and no triple, and no longer n-grams."""
    said = [Prediction(" abc\n", "end", 3), Prediction("abc", "length", 5)]
    figures = predictions.measures(["abc", None], said)
    assert figures == {
        "exact_match": 1.0, "chrf": 100.0, "n_exact_match": 1, "n_chrf": 1, "ended": 0.5, "mean_tokens": 4.0, "n": 2,
        "unanswered": 0,
    }  # fmt: skip
    figures = predictions.measures(["abd"], said[1:])
    assert figures["chrf"] == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)
    figures = predictions.measures(["abc", "abd", "x", "y"], said + said)
    assert figures["exact_match"] == 0.25
    assert figures["exact_match_stderr"] == pytest.approx((0.25 * 0.75 / 3) ** 0.5)
    assert predictions.measures([None, None], said).keys() == {"ended", "mean_tokens", "n", "unanswered"}


def test_chrf_counts_the_corpus_as_sacrebleu_and_tells_missing_from_made_up():
    """Recall weighs twice: half of a text is worse than a text and as much again. Korean goes by syllables."""
    told = lambda *texts: [Prediction(text, "end", 1) for text in texts]  # noqa: E731
    whole = "비가 오면 우산을 챙기세요"
    half, twice = (predictions.measures([whole], told(text))["chrf"] for text in (whole[:7], whole + whole))
    assert 0 < half < twice < 100
    both = predictions.measures([whole, "네"], told(whole[:7], "네"))["chrf"]
    assert half < both < 100


def test_the_digest_knows_rows_template_and_references(parts):
    _, tokenizer, template = parts
    digest = lambda rows, own=template: predictions.digest(  # noqa: E731
        predictions.ask(rows, tokenizer, own), tokenizer, own
    )
    base = digest([(1, ROWS[0])])
    assert base == digest([(1, ROWS[0])])
    others = [[(2, ROWS[0])], [(1, ROWS[1])], [(1, Record.single(ROWS[0].instruction, "", "Another."))]]
    assert len({base, *map(digest, others), digest([(1, ROWS[0])], load_template("alpaca"))}) == 5
