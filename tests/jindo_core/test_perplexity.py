"""Perplexity against the loop of transformers' documentation, and text in blocks against the whole."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from jindo_core.errors import InputError
from jindo_core.likelihood import score
from jindo_core.loader import load_model
from jindo_core.perplexity import TextTokens, Windows, choose_window, measures
from jindo_core.tokenizer import load_tokenizer

STORY = (
    "Once upon a time there was a little dog named Max.\nHe liked to run in the park, and he had a red ball.\n\n"
    "One day Max found a big box. \"What is in it?\" he said.\r\n  He opened it and saw 3 small cats!\n"
) * 6
KOREAN = "봄이 오면 산에 들에 꽃이 핀다.\n아이들은 냇가에서 물장구를 치고, 할머니는 나물을 캔다.\n\n\t- 첫째, 둘째 …\n"
CODE = "def twice(x):\n    return 2 * x\n\n\nif __name__ == \"__main__\":\n    print(twice(21))  # 42\n"
MIXED = (STORY[:300] + KOREAN + CODE + "🙂 e\u0301 ﬁ ½\n\n\n") * 12 + "한 줄로 아주 긴 글이 이어진다 and goes on " * 60


@pytest.fixture(scope="module")
def model(stories260k):
    return load_model(stories260k, quantize=None, dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def tokenizer(stories260k):
    return load_tokenizer(stories260k)


def text_file(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode(encoding) if isinstance(text, str) else text)
    return path


def measured(model, tokenizer, path, window, stride, limit=None):
    windows = Windows(TextTokens(path, tokenizer), tokenizer, window, stride, limit)
    requests = list(windows)
    return measures(windows, [(len(r.continuation), score(model, [r], pad_id=0)[0]) for r in requests])


@torch.no_grad()
def documented(theirs, ids, window, stride):
    """The documentation's loop: (summed nats, tokens predicted, its own figure, which weighs a window by one less)."""
    nats, tokens, weighted, weights, before = 0.0, 0, 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        inputs = torch.tensor([ids[begin:end]])
        labels = inputs.clone()
        labels[:, : -(end - before)] = -100
        predicted = int((labels[:, 1:] != -100).sum())
        if predicted:
            loss = float(theirs(inputs, labels=labels).loss)
            nats, tokens = nats + loss * predicted, tokens + predicted
            weight = int((labels != -100).sum()) - 1
            weighted, weights = weighted + loss * weight, weights + weight
        before = end
        if end == len(ids):
            break
    return nats, tokens, math.exp(weighted / weights)


@pytest.mark.parametrize(("window", "stride"), [(64, 32), (64, 64), (50, 7), (512, 256), (2, 1)])
def test_the_figures_are_those_of_the_documented_loop(model, tokenizer, stories260k, tmp_path, window, stride):
    text = STORY[: 250 if window < 50 else None]
    theirs = AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float32).eval()
    nats, tokens, own = documented(theirs, tokenizer.encode(text), window, stride)
    figures = measured(model, tokenizer, text_file(tmp_path, text), window, stride)
    assert figures["tokens"] == tokens
    assert figures["nats_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert figures["bytes"] == len(text.encode())
    assert figures["bits_per_byte"] == pytest.approx(nats / len(text.encode()) / math.log(2), rel=1e-5)
    assert figures["byte_perplexity"] == pytest.approx(2 ** figures["bits_per_byte"])
    if stride > 1:
        assert figures["perplexity"] == pytest.approx(own, rel=0.05)


def test_every_token_is_predicted_once(tokenizer, tmp_path):
    ids = tokenizer.encode(STORY)
    for window, stride in ((64, 32), (33, 5), (1000, 1000), (len(ids), 3)):
        windows = Windows(TextTokens(text_file(tmp_path, STORY), tokenizer), tokenizer, window, stride, None)
        requests = list(windows)
        assert [token for request in requests for token in request.continuation] == ids[1:]
        assert all(len(request) <= window for request in requests)
        assert all(len(request.context) >= min(window - stride, 1) for request in requests)


def test_a_limit_counts_the_text_that_its_windows_hold(tokenizer, tmp_path):
    path = text_file(tmp_path, STORY)
    windows = Windows(TextTokens(path, tokenizer), tokenizer, 64, 32, 3)
    requests = list(windows)
    covered = tokenizer.encode(STORY)[:128]
    assert sum(len(request.continuation) for request in requests) == 127
    assert windows.bytes_covered == len(tokenizer.decode(covered).encode())


@pytest.fixture(scope="module", params=["stories260K", "llama-32000", "mistral-v1-32000", "ko-jungwhank", "SmolLM2"])
def any_tokenizer(request, assets, smollm2_gguf):
    others = {"SmolLM2": smollm2_gguf, "stories260K": assets / "models/stories260K-hf"}
    return load_tokenizer(others.get(request.param, assets / "tokenizers" / request.param))


@pytest.mark.parametrize("block", [700, 1500])
def test_text_in_blocks_has_the_ids_of_the_whole(any_tokenizer, tmp_path, block):
    path = text_file(tmp_path, MIXED)
    text = TextTokens(path, any_tokenizer, block=block)
    pieces = list(text)
    assert len(pieces) > 3
    assert "".join(piece for _, piece in pieces) == MIXED
    assert [token for ids, _ in pieces for token in ids] == any_tokenizer.encode(MIXED)
    assert text.bytes_read == path.stat().st_size


def test_text_without_a_seam_is_one_piece(tokenizer, tmp_path):
    text = "가나다라마바사" * 500
    ((ids, piece),) = TextTokens(text_file(tmp_path, text), tokenizer, block=700)
    assert piece == text
    assert ids == tokenizer.encode(text)


def test_a_byte_order_mark_is_no_text(tokenizer, tmp_path):
    ((ids, piece),) = TextTokens(text_file(tmp_path, "Once upon", "utf-8-sig"), tokenizer)
    assert piece == "Once upon"
    assert ids == tokenizer.encode("Once upon")


@pytest.mark.parametrize(("data", "message"), [(b"abc\xff\xfe", "no UTF-8"), (b"abc\xea\xb0", "no UTF-8")])
def test_what_is_no_text_is_named(tokenizer, tmp_path, data, message):
    with pytest.raises(InputError, match=message):
        list(TextTokens(text_file(tmp_path, data), tokenizer))
    with pytest.raises(InputError, match="expected a readable text file"):
        list(TextTokens(tmp_path / "gone.txt", tokenizer))


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_an_empty_text_has_no_windows(tokenizer, tmp_path, stride):
    assert list(Windows(TextTokens(text_file(tmp_path, ""), tokenizer), tokenizer, 8, stride, None)) == []


def test_a_window_fits_the_model():
    assert choose_window(512, None, None) == (512, 256)
    assert choose_window(8192, None, None) == (2048, 1024)
    assert choose_window(None, 4096, 512) == (4096, 512)
    with pytest.raises(InputError, match="--window: got 513, expected at most the model's context of 512"):
        choose_window(512, 513, None)
    with pytest.raises(InputError, match="--stride: got 65, expected at most the window of 64"):
        choose_window(512, 64, 65)
