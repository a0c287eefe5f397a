"""Tokenizers against their sources: sentencepiece itself, the tokenizers library, transformers' GGUF reader."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import sentencepiece

from jindo_core.errors import InputError
from jindo_core.tokenizer import StreamDecoder, load_tokenizer

TEXTS = [
    "",
    "x",
    " x",
    "  two spaces first",
    "a  b",
    "a   b \n\n\tc",
    "ends with spaces  ",
    "</s>",
    "before </s> after <s> and <unk>",
    "안녕하세요, 진돗개입니다.",
    "대한민국의 수도는 서울이에요. 뷁꿹!",
    "한국어 and English 섞어 쓰기 123 4567",
    "😀 이모지 👨‍👩‍👧 漢字 かな",
    "### Instruction:\n요약해 주세요.\n\n### Response:\n",
    "줄\r\n바꿈\u200b과\u3000공백",
    "decomposed: \u1112\u1161\u11ab",
]
SENTENCEPIECE = [
    "models/stories260K-hf/tokenizer.model",
    "tokenizers/llama-32000/tokenizer.model",
    "tokenizers/mistral-v1-32000/tokenizer.model",
    "tokenizers/ko-jungwhank/tokenizer.model",
]


@pytest.fixture(scope="module")
def corpus(assets):
    """The texts above and real Korean rows, \\r\\n and all."""
    rows = json.loads((assets / "data/ko/ko_sharegpt_deepl_translate_cleaned_v2.json").read_text("utf-8"))
    return TEXTS + [row["output"] for row in rows[:60]] + [row["instruction"] for row in rows[60:90]]


@pytest.fixture
def folder(tmp_path, assets):
    """Makes a model folder with LLaMA's tokenizer.model and the given JSON files."""

    def make(model="tokenizers/llama-32000/tokenizer.model", **files):
        shutil.copy(assets / model, tmp_path / "tokenizer.model")
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        return tmp_path

    return make


@pytest.fixture(scope="module")
def gguf_tokenizer(smollm2_gguf):
    return load_tokenizer(smollm2_gguf)


@pytest.fixture(scope="module")
def transformers_tokenizer(smollm2_gguf):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(smollm2_gguf.parent), gguf_file=smollm2_gguf.name)


# --- SentencePiece --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", SENTENCEPIECE)
def test_sentencepiece_is_exact(folder, assets, corpus, model):
    tokenizer = load_tokenizer(folder(model))
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(assets / model))
    for text in corpus:
        ids = oracle.encode(text)
        assert tokenizer.encode(text, bos=False) == ids
        assert tokenizer.encode(text) == [oracle.bos_id(), *ids]
        assert tokenizer.decode(tokenizer.encode(text)) == oracle.decode(ids)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (oracle.bos_id(), oracle.eos_id())
    assert tokenizer.vocab_size == oracle.get_piece_size()


@pytest.mark.parametrize("model", SENTENCEPIECE[1:3])
def test_text_comes_back_whole(folder, assets, model):
    """Those with byte fallback lose nothing: neither spaces nor Korean that has no piece of its own."""
    tokenizer = load_tokenizer(folder(model))
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(assets / model))
    assert any(oracle.is_byte(i) for i in tokenizer.encode("뷁", bos=False))


def test_special_text_stays_text(stories15m):
    tokenizer = load_tokenizer(stories15m)
    assert tokenizer.eos_id == 2
    assert 2 not in tokenizer.encode("a </s> b </s>")
    assert tokenizer.encode("<s>").count(1) == 1  # the BOS in front
    assert tokenizer.decode([1, *tokenizer.encode("a </s>"), 2]) == "a </s>"


def test_bos_where_the_tokenizer_adds_one(folder):
    for setting, expected in ((True, [1]), (False, []), (None, [1])):
        tokenizer = load_tokenizer(folder(tokenizer_config={"add_bos_token": setting}))
        assert tokenizer.adds_bos == bool(expected)
        assert tokenizer.encode("") == expected
        assert tokenizer.encode("", bos=True) == [1]
        assert tokenizer.encode("", bos=False) == []


def test_no_eos_is_ever_added(folder):
    tokenizer = load_tokenizer(folder(tokenizer_config={"add_eos_token": True, "add_bos_token": False}))
    assert tokenizer.encode("x") == tokenizer.encode("x", bos=False)
    assert 2 not in tokenizer.encode("x")


def test_special_tokens_from_the_configuration(folder):
    plain = load_tokenizer(folder(tokenizer_config={"bos_token": "<unk>", "eos_token": "<s>"}))
    assert (plain.bos_id, plain.eos_id) == (0, 1)
    objects = load_tokenizer(
        folder(tokenizer_config={}, special_tokens_map={"eos_token": {"content": "<s>", "lstrip": False}})
    )
    assert (objects.bos_id, objects.eos_id) == (1, 1)


def test_empty_special_tokens_fall_back_to_the_models_own(folder):
    """The first LLaMA conversions name "" for both, and config.json gives ids that are wrong (alpaca-lora#279)."""
    tokenizer = load_tokenizer(
        folder(
            tokenizer_config={"bos_token": "", "eos_token": "", "unk_token": ""},
            config={"bos_token_id": 0, "eos_token_id": 1},
        )
    )
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_ids_of_a_korean_tokenizer(folder):
    tokenizer = load_tokenizer(folder("tokenizers/ko-jungwhank/tokenizer.model"))
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 2, 3)


def test_pad_is_a_filler_that_exists(folder):
    assert load_tokenizer(folder()).pad_id == 2  # LLaMA has none: EOS
    assert load_tokenizer(folder(tokenizer_config={"pad_token": "<unk>"})).pad_id == 0
    added = load_tokenizer(folder(tokenizer_config={"pad_token": "<pad>"}, added_tokens={"<pad>": 32000}))
    assert added.pad_id == 2
    added.check(32000)  # no row is missing


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"eos_token": "<|im_end|>"}, "added_tokens": {"<|im_end|>": 32000}},
        {
            "tokenizer_config": {
                "eos_token": {"content": "<|im_end|>"},
                "added_tokens_decoder": {"32000": {"content": "<|im_end|>", "special": True}},
            }
        },
    ],
)
def test_an_added_eos(folder, files):
    tokenizer = load_tokenizer(folder(**files))
    assert tokenizer.eos_id == 32000
    assert tokenizer.vocab_size == 32001
    assert tokenizer.decode([*tokenizer.encode("안녕"), 32000]) == "안녕"
    tokenizer.check(32064)
    with pytest.raises(InputError, match=r"EOS id is 32000, but the model's embedding has 32000 rows"):
        tokenizer.check(32000)


def test_an_eos_that_is_no_piece_is_refused(folder):
    with pytest.raises(InputError, match=r"names '<\|end\|>' as eos_token, which is no piece"):
        load_tokenizer(folder(tokenizer_config={"eos_token": "<|end|>"}))


def test_ids_beyond_the_vocabulary_decode_to_nothing(stories260k):
    """Embeddings are often padded to a round number of rows, and a model can name one of those."""
    tokenizer = load_tokenizer(stories260k)
    ids = tokenizer.encode("Once")
    assert tokenizer.decode([*ids, 512, 600]) == "Once"
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([700]) == ""


def test_a_vocabulary_larger_than_the_model_is_refused(stories260k, stories15m):
    load_tokenizer(stories260k).check(512)
    with pytest.raises(InputError, match="32000 tokens, but the model's embedding has 512 rows"):
        load_tokenizer(stories15m).check(512)


# --- tokenizer.json -------------------------------------------------------------------------------------


def llama_json(model_file, **changes):
    """A tokenizer.json in the form that LLaMA models carry, for the pieces of a SentencePiece model."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    merges = [
        [piece[:cut], piece[cut:]]
        for piece, i in sorted(vocab.items(), key=lambda item: -pieces.get_score(item[1]))
        if not (pieces.is_byte(i) or pieces.is_control(i) or pieces.is_unknown(i))
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": kind}} for name, kind in (("A", 0), ("B", 1)))
    return {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0},
        "padding": None,
        "added_tokens": [{"id": i, "content": c, **special} for i, c in enumerate(("<unk>", "<s>", "</s>"))],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, second],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": merges,
        },
        **changes,
    }


@pytest.fixture
def json_folder(tmp_path, stories260k):
    """Makes a model folder with that tokenizer.json and the given JSON files."""

    def make(changes=None, **files):
        files["tokenizer"] = llama_json(stories260k / "tokenizer.model", **(changes or {}))
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        return tmp_path

    return make


def test_tokenizer_json_means_what_it_says(json_folder, corpus):
    """Under the class name LlamaTokenizer too, for which transformers 5 replaces the file's normalizer."""
    path = json_folder(tokenizer_config={"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"})
    from tokenizers import Tokenizer

    oracle = Tokenizer.from_file(str(path / "tokenizer.json"))
    oracle.no_truncation()
    tokenizer = load_tokenizer(path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (512, 1, 2, 2)
    assert tokenizer.adds_bos
    for text in corpus:
        assert tokenizer.encode(text, bos=False) == oracle.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == oracle.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == oracle.decode(oracle.encode(text).ids)


def test_tokenizer_json_wins_over_tokenizer_model(json_folder, stories15m):
    path = json_folder()
    shutil.copy(stories15m / "tokenizer.model", path)
    assert load_tokenizer(path).vocab_size == 512


def test_special_ids_from_config_json_where_the_tokenizer_names_none(json_folder):
    alone = load_tokenizer(json_folder())
    assert (alone.bos_id, alone.eos_id, alone.pad_id, alone.adds_bos) == (None, None, 0, False)
    with pytest.raises(InputError, match="no BOS token"):
        alone.encode("x", bos=True)
    tokenizer = load_tokenizer(json_folder(config={"bos_token_id": 1, "eos_token_id": [2, 0]}))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.adds_bos) == (1, 2, 2, True)
    assert tokenizer.decode([*tokenizer.encode("a b"), 2]) == "a b"


# --- GGUF -----------------------------------------------------------------------------------------------


def test_gguf_is_transformers(gguf_tokenizer, transformers_tokenizer, corpus):
    for text in [*corpus, "<|im_start|>user\n안녕<|im_end|>"]:
        ids = transformers_tokenizer(text).input_ids
        assert gguf_tokenizer.encode(text) == ids
        assert gguf_tokenizer.decode(ids) == transformers_tokenizer.decode(ids, skip_special_tokens=True)
        if "<|" not in text:
            assert gguf_tokenizer.decode(ids) == text


def test_smollm2_declares_no_bos_to_add(gguf_tokenizer):
    assert (gguf_tokenizer.bos_id, gguf_tokenizer.eos_id, gguf_tokenizer.pad_id) == (1, 2, 2)
    assert not gguf_tokenizer.adds_bos
    assert gguf_tokenizer.encode("x") == gguf_tokenizer.encode("x", bos=True)[1:]
    gguf_tokenizer.check(49152)
    with pytest.raises(InputError, match="49152 tokens"):
        gguf_tokenizer.check(49151)


def test_a_saved_copy_is_the_same(gguf_tokenizer, transformers_tokenizer, corpus, tmp_path):
    transformers_tokenizer.save_pretrained(tmp_path)
    copy = load_tokenizer(tmp_path)
    assert (copy.vocab_size, copy.bos_id, copy.eos_id) == (49152, 1, 2)
    for text in corpus:
        assert copy.encode(text) == gguf_tokenizer.encode(text)


# --- streaming ------------------------------------------------------------------------------------------


def stream(tokenizer, ids):
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(i) for i in ids), decoder.flush()]


@pytest.mark.parametrize("kind", ["sentencepiece", "json", "gguf"])
def test_a_stream_is_the_whole_text(kind, gguf_tokenizer, json_folder, folder, corpus):
    tokenizer = {"sentencepiece": folder, "json": json_folder, "gguf": lambda: gguf_tokenizer}[kind]()
    if kind != "gguf":
        tokenizer = load_tokenizer(tokenizer)
    for text in TEXTS + [text[:200] for text in corpus[len(TEXTS) :: 5]]:
        ids = tokenizer.encode(text)
        pieces = stream(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        assert "\ufffd" not in "".join(pieces)


def test_korean_comes_syllable_by_syllable(gguf_tokenizer):
    ids = gguf_tokenizer.encode("진돗개")
    assert len(ids) > 3
    pieces = stream(gguf_tokenizer, ids)
    assert [piece for piece in pieces if piece] == ["진", "돗", "개"]
    assert pieces[-1] == ""  # nothing was held back in the end


def test_bytes_that_are_no_text_appear_when_it_is_over(stories15m):
    tokenizer = load_tokenizer(stories15m)
    whole = tokenizer.encode("가뷁", bos=False)
    pieces = stream(tokenizer, whole[:-1])  # the last syllable lacks its last byte
    assert "".join(pieces[:-1]) == "가"
    assert set(pieces[-1]) == {"\ufffd"}
    assert "".join(pieces) == tokenizer.decode(whole[:-1])


def test_text_once_given_stays(json_folder):
    """The tokenizers library turns a whole run of bytes into U+FFFD when one is missing, even good ones."""
    tokenizer = load_tokenizer(json_folder())
    ids = tokenizer.encode("가나", bos=False)
    assert tokenizer.decode(ids[:-1]).count("\ufffd") == 5
    pieces = stream(tokenizer, ids)
    assert [piece for piece in pieces if piece.strip()] == ["가", "나"]


# --- bad input ------------------------------------------------------------------------------------------


def test_a_path_that_is_no_tokenizer(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no tokenizer: expected tokenizer\.json or tokenizer\.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("damage", ["half", "junk", "empty"])
def test_a_damaged_tokenizer_model(tmp_path, stories15m, damage):
    data = (stories15m / "tokenizer.model").read_bytes()
    data = {"half": data[: len(data) // 2], "junk": b"junk" * 100, "empty": b""}[damage]
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(InputError, match=r"expected a SentencePiece model|no whole SentencePiece model") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model": 3}', ""])
def test_a_damaged_tokenizer_json(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer\.json") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_configuration(folder):
    path = folder()
    (path / "tokenizer_config.json").write_bytes(b'{"bos_token": "\xff"}')
    with pytest.raises(InputError, match=r"tokenizer_config\.json is no valid JSON"):
        load_tokenizer(path)


@pytest.mark.parametrize("size", [10, 400_000])
def test_a_gguf_cut_short(tmp_path, smollm2_gguf, size):
    with open(smollm2_gguf, "rb") as file:
        (tmp_path / "cut.gguf").write_bytes(file.read(size))
    with pytest.raises(InputError, match="can't be read") as caught:
        load_tokenizer(tmp_path / "cut.gguf")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04rest")
    with pytest.raises(InputError, match="expected a GGUF file"):
        load_tokenizer(tmp_path / "model.gguf")


def test_importing_loads_nothing_heavy():
    code = (
        "import sys, jindo_core.tokenizer, jindo_core.data.records, jindo_core.data.examples, "
        "jindo_core.data.templates; "
        "print([m for m in ('torch', 'transformers', 'datasets', 'triton', 'sentencepiece') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
