"""Batches of plain text and where tokens lie: against the libraries themselves, and special tokens as text."""

from __future__ import annotations

import pytest

from jindo_core.tokenizer import SpecialToken, _Fast, load_tokenizer

TEXTS = [
    "", "x", " x", "a  b", "</s> <s> <|im_end|>", "한국어 and English\n\n", "뷁꿹 😀", "줄\r\n바꿈\u200b", "ends  ",
]  # fmt: skip


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf):
    return load_tokenizer(smollm2_gguf)


@pytest.fixture(scope="module")
def llama(stories15m):
    return load_tokenizer(stories15m)


def test_a_batch_is_its_texts(smollm2, llama):
    for tokenizer in (smollm2, llama):
        batch = tokenizer.encode_batch(TEXTS)
        assert batch == [tokenizer.encode_batch([text])[0] for text in TEXTS]
        assert batch == [ids for ids, _ in tokenizer.encode_spans(TEXTS)]
        assert tokenizer.encode_batch([]) == tokenizer.encode_spans([]) == []
        for text, ids in zip(TEXTS, batch, strict=True):
            if "<|im_end|>" not in text:
                assert ids == tokenizer.encode(text, bos=False)
            assert tokenizer.decode(ids) == text


def test_special_tokens_in_a_batch_are_text_and_encode_still_knows_them(smollm2):
    (plain,) = smollm2.encode_batch(["a<|im_end|>"])
    assert smollm2.eos_id not in plain
    assert smollm2.encode("a<|im_end|>")[-1] == smollm2.eos_id
    assert smollm2.encode_batch(["a<|im_end|>"]) == [plain]


def test_where_the_last_character_lies(smollm2, llama):
    ids, last = llama.encode_spans(["뷁 ab"])[0]
    assert [llama.piece(i) for i in ids] == ["▁", "<0xEB>", "<0xB7>", "<0x81>", "▁ab"]
    assert last == [0, 0, 0, 0, 3]
    ids, last = smollm2.encode_spans([" 뷁 ab"])[0]
    assert smollm2.decode([i for i, place in zip(ids, last, strict=True) if place >= 2]) == " ab"
    # White space alone keeps its place, which ByteLevel's post-processor would trim away.
    ids, last = smollm2.encode_spans(["a\n\n"])[0]
    assert last == [0, 2]


def test_special_tokens_and_their_texts(smollm2, llama):
    assert llama.special_tokens == {"<s>": SpecialToken(1), "</s>": SpecialToken(2)}
    assert llama.special_texts["bos_token"] == "<s>"
    assert smollm2.special_tokens["<|im_end|>"] == SpecialToken(2)
    assert len(smollm2.special_tokens) == 17
    assert smollm2.special_texts["eos_token"] == "<|im_end|>"
    assert "<|im_start|>" in smollm2.chat_template
    assert llama.chat_template is None
    assert (llama.piece(2), llama.piece(10**6)) == ("</s>", "<1000000>")
    assert (smollm2.piece(2), smollm2.piece(10**6)) == ("<|im_end|>", "<1000000>")


def test_a_digest_knows_the_vocabulary_and_the_special_ids(smollm2, llama, stories260k, monkeypatch):
    digests = {tokenizer.digest() for tokenizer in (smollm2, llama, load_tokenizer(stories260k))}
    assert len(digests) == 3
    before = llama.digest()
    assert load_tokenizer(stories260k).digest() in digests
    monkeypatch.setattr(llama, "adds_bos", not llama.adds_bos)
    assert llama.digest() != before


def test_a_space_before_a_rows_first_word_alone():
    """Metaspace's "first": behind a special token transformers puts no space, and neither do runs encoded apart."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {text: i for i, text in enumerate(["<s>", "</s>", "<unk>", "▁", "a", "b", "▁a", "▁b"])}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "b")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in ("<s>", "</s>")])
    tokenizer = _Fast(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>"))
    whole = tokenizer.encode("a</s>b b</s>", bos=False)
    assert whole == [6, 1, 5, 7, 1]
    assert [*tokenizer.encode_batch(["a"])[0], 1, *tokenizer.encode_batch(["b b"], opens=False)[0], 1] == whole
    assert tokenizer.encode_spans(["b b"], opens=False) == [([5, 7], [0, 2])]
    assert tokenizer.encode_batch(["b"]) == [[7]]
