"""Duplicates: our signatures beside datasketch's, what is found beside all pairs, and evaluation sets."""

from __future__ import annotations

import json
import pickle
import random
import re

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH
from scipy.sparse import csr_array

from jindo_core.data.records import Record
from jindo_core.errors import InputError
from jindo_core.refinery.contamination import Contamination
from jindo_core.refinery.duplicate_steps import ExactDuplicates, NearDuplicates, first_of_group
from jindo_core.refinery.minhash import (
    band_hashes,
    bands,
    folded,
    near_duplicates,
    shingles,
    signature,
)
from jindo_core.refinery.pipeline import Item, Rejected

WORDS = [
    f"{first}{second}"
    for first in ("가을", "바다", "아침", "기차", "학교", "음악", "겨울")
    for second in ("산책", "노래", "우산", "연필", "시장", "구름", "지도")
]


def item(output, number=1, instruction="질문"):
    return Item(Record.single(instruction, "", output, number), {}, number)


def keys_of(step, items):
    rows = [step.key(each) for each in items]
    assert len({len(row) for row in rows}) == 1
    return np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(len(rows), -1)


def decide(step, items):
    numbers = np.array([each.number for each in items])
    return list(step.decide(keys_of(step, items), numbers))


def sentence(rng, words):
    return " ".join(rng.choice(WORDS) for _ in range(words))


def edited(rng, text, edits):
    """The text with some of its words replaced."""
    words = text.split()
    for place in rng.sample(range(len(words)), edits):
        words[place] = rng.choice(WORDS)
    return " ".join(words)


@pytest.fixture(scope="module")
def near_rows():
    """2,400 texts: a third originals, the others copies with none to eight of their 24 words replaced."""
    rng = random.Random(5)
    rows = [sentence(rng, 24) for _ in range(800)]
    rows += [edited(rng, rng.choice(rows[:800]), rng.randrange(9)) for _ in range(1600)]
    rng.shuffle(rows)
    return rows


@pytest.fixture(scope="module")
def similarities(near_rows):
    """Every pair's true Jaccard similarity [n, n], by the product of the rows' sets of shingles."""
    letters = [re.sub(r"\s", "", row) for row in near_rows]
    sets = [sorted({text[place : place + 4] for place in range(len(text) - 3)}) for text in letters]
    names = {name: place for place, name in enumerate(sorted({run for each in sets for run in each}))}
    columns = [names[run] for each in sets for run in each]
    ends = np.cumsum([0] + [len(each) for each in sets])
    table = csr_array((np.ones(len(columns), dtype=np.float32), columns, ends), shape=(len(sets), len(names)))
    both = (table @ table.T).toarray()
    sizes = both.diagonal()
    return both / (sizes[:, None] + sizes[None] - both)


@pytest.fixture(scope="module")
def signatures(near_rows):
    return np.stack([signature(shingles(folded(row), 4), 128) for row in near_rows])


# --- shingles and signatures -----------------------------------------------------------------------------


def test_folding():
    def text(of):
        return "".join(map(chr, folded(of)))

    assert text("Ｈello, 세 계!\t12") == "hello세계12"
    assert text("\u1112\u1161\u11ab글") == text("한글")
    assert text("😀 é İ \ud800") == "😀éi̇" or text("😀 é \ud800") == "😀é"
    assert len(folded("")) == 0


def test_shingles_tell_runs_apart():
    assert len(shingles(folded("가나다라마"), 4)) == 2
    assert len(shingles(folded("가나"), 4)) == 1
    assert len(shingles(folded("!?"), 4)) == 0
    rng = random.Random(1)
    runs = {"".join(rng.choice("가나다라마바사아자차카타파하abcdef") for _ in range(4)) for _ in range(20_000)}
    assert len({int(shingles(folded(run), 4)[0]) for run in runs}) >= len(runs) - 3  # 2^32 values: a collision or none


def test_signatures_are_datasketchs(near_rows):
    for text in near_rows[:20]:
        hashes = shingles(folded(text), 4)
        theirs = MinHash(128, hashfunc=int, scheme="affine32")
        theirs.update_batch(hashes.tolist())
        assert np.array_equal(signature(hashes, 128), theirs.hashvalues)
    long = shingles(folded(" ".join(near_rows[:40])), 4)
    assert len(long) > 2048  # more than one piece at a time
    theirs = MinHash(64, hashfunc=int, scheme="affine32")
    theirs.update_batch(long.tolist())
    assert np.array_equal(signature(long, 64), theirs.hashvalues)


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_pairs_at_the_threshold(threshold):
    number, rows = bands(threshold, 128)
    assert number * rows <= 128
    assert 1 - (1 - threshold**rows) ** number >= 0.95


def test_bands_give_the_candidates_of_datasketchs_index(signatures):
    """Every pair that its LSH brings together with the same bands, and no other."""
    number, rows = bands(0.8, 128)
    index = MinHashLSH(params=(number, rows), num_perm=128)
    hashes = [MinHash(128, hashvalues=each, scheme="affine32") for each in signatures[:1500]]
    for row, each in enumerate(hashes):
        index.insert(row, each)
    theirs = {(other, row) for row, each in enumerate(hashes) for other in index.query(each) if other < row}
    ours = set()
    for band in range(number):
        values = band_hashes(signatures[:1500], band * rows, rows)[:, 0]
        same = values[:, None] == values[None]
        ours |= set(zip(*np.nonzero(np.triu(same, 1)), strict=True))
    assert {(int(a), int(b)) for a, b in ours} == theirs
    assert len(theirs) > 50


# --- near duplicates -------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.7, 0.8, 0.9])
def test_recall_and_precision_against_all_pairs(near_rows, signatures, similarities, threshold):
    """What goes, held to true similarities with the rows that stay; a signature's own error is 0.04 at 0.8."""
    found = dict(near_duplicates(signatures, threshold))
    stay = np.array([row not in found for row in range(len(near_rows))])
    for row, earlier in found.items():
        assert earlier < row
        assert stay[earlier]
        assert similarities[row, earlier] > threshold - 0.12
    precise = np.mean([similarities[row, earlier] >= threshold - 0.02 for row, earlier in found.items()])
    nearest = np.array([similarities[row, :row][stay[:row]].max(initial=0) for row in range(len(near_rows))])
    clear, at_all = nearest >= threshold + 0.05, nearest >= threshold
    recall = np.mean([row in found for row in np.flatnonzero(clear)])
    assert clear.sum() > 100
    assert recall >= 0.98, recall
    assert np.mean([row in found for row in np.flatnonzero(at_all)]) >= 0.85
    assert precise >= 0.9, precise


def test_as_many_as_datasketchs_index_finds(signatures):
    """A row goes by ours wherever theirs, asked in order for rows that stay, finds one as similar."""
    number, rows = bands(0.8, 128)
    index = MinHashLSH(params=(number, rows), num_perm=128)
    theirs = {}
    kept = {}
    for row, values in enumerate(signatures):
        own = MinHash(128, hashvalues=values, scheme="affine32")
        near = [other for other in sorted(index.query(own)) if own.jaccard(kept[other]) >= 0.8]
        if near:
            theirs[row] = near[0]
        else:
            index.insert(row, own)
            kept[row] = own
    assert dict(near_duplicates(signatures, 0.8)) == theirs


def test_the_earliest_stays_and_chains_are_thinned_only():
    rng = random.Random(3)
    first = sentence(rng, 60)
    second = edited(rng, first, 3)
    words = second.split()
    changed = [place for place, (a, b) in enumerate(zip(words, first.split(), strict=True)) if a == b][:12]
    third = " ".join("다른" if place in changed else word for place, word in enumerate(words))
    step = NearDuplicates(threshold=0.79, permutations=1024)
    items = [item(text, number) for number, text in enumerate([first, second, third], 11)]
    ((row, reason),) = decide(step, items)
    assert row == 1
    assert re.fullmatch(r"nearly row 11 \(similarity 0\.[789]\d\)", reason)
    # Without the first, the second takes the third with it.
    ((row, reason),) = decide(step, items[1:])
    assert row == 1
    assert reason.startswith("nearly row 12 ")


def test_a_crowd_of_near_rows_leaves_one_each():
    """More rows in one band than are compared with each other at once."""
    rng = random.Random(9)
    one, other = sentence(rng, 60), sentence(rng, 60)
    crowd = [edited(rng, text, rng.randrange(2)) for text in (one, other) for _ in range(150)]
    rng.shuffle(crowd)
    signatures = np.stack([signature(shingles(folded(row), 4), 128) for row in crowd])
    found = dict(near_duplicates(signatures, 0.7))
    assert len(crowd) - len(found) == 2
    assert len(dict(near_duplicates(np.repeat(signatures[:1], 500, axis=0), 0.8))) == 499


def test_near_keys():
    step = NearDuplicates()
    assert step.key(item("짧다")) == b""
    assert len(step.key(item("문장 " * 30))) == 256
    assert len(NearDuplicates(permutations=64).key(item("문장 " * 30))) == 128
    # Spacing and punctuation are no difference.
    assert step.key(item("가을 바다를 오래도록 천천히 걷는 산책, 그리고 커피!")) == step.key(
        item("가을바다를 오래도록 천천히 걷는 산책 그리고커피")
    )
    answers = NearDuplicates(of="answer")
    text = "가을 바다를 걷는 산책 그리고 커피 한 잔과 기차 여행"
    assert answers.key(item(text, instruction="하나")) == answers.key(item(text, instruction="둘"))
    assert decide(step, [item("가을 바다 산책 아침 저녁 기차 학교 친구 음악")] * 1) == []


# --- exact duplicates ------------------------------------------------------------------------------------


def test_exact_duplicates():
    items = [
        item("가을  바다", 4),
        item("겨울 바다", 5),
        item("가을 바다", 6),
        item("가을 바다\n", 9),
        item("가을바다!", 10),
    ]
    assert decide(ExactDuplicates(), items) == [(2, "the same as row 4"), (3, "the same as row 4")]
    assert [row for row, _ in decide(ExactDuplicates(letters_only=True), items)] == [2, 3, 4]
    questions = [item("하나", 1, "같은 질문"), item("둘", 2, "같은 질문"), item("하나", 3, "다른 질문")]
    assert decide(ExactDuplicates(of="question"), questions) == [(1, "the same as row 1")]
    assert decide(ExactDuplicates(of="answer"), questions) == [(2, "the same as row 1")]
    assert ExactDuplicates(of="answer").key(item("")) == b""


def test_groups_by_sorting_are_a_dictionarys():
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 3, (2000, 8), dtype=np.uint8).repeat(2, axis=1)
    seen: dict[bytes, int] = {}
    expected = [seen.setdefault(key.tobytes(), row) for row, key in enumerate(keys)]
    assert first_of_group(keys).tolist() == expected
    assert first_of_group(np.empty((0, 16), dtype=np.uint8)).tolist() == []


# --- evaluation sets -------------------------------------------------------------------------------------

QUESTION = "붉은 등대가 보이는 작은 항구 마을에서 어부 세 사람이 새벽마다 그물을 던지고 노래를 불렀다."


@pytest.fixture
def evaluation(tmp_path):
    path = tmp_path / "dev.tsv"
    rows = ["id\ttext\tlabel\tlink", "1\t짧은 글\t0\thttps://example.org/one", f"2\t{QUESTION}\t1\tx"]
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def test_rows_of_an_evaluation_set_go(evaluation):
    step = Contamination(against=(str(evaluation),))
    assert step(item("네", instruction=QUESTION)) == Rejected("the same as dev.tsv, row 2")
    assert step(item(QUESTION.replace(" ", "") + "!!")) == Rejected("the same as dev.tsv, row 2")
    whole = step(item(f"다음 글을 읽고 답하세요. {QUESTION} 어부는 몇 사람인가요? 그 까닭도 적어 주세요."))
    assert whole == Rejected("shares 100% of its runs of words with dev.tsv, row 2")
    near = step(item(QUESTION.replace("불렀다", "불렀네")))
    assert isinstance(near, Rejected)
    assert re.fullmatch(r"shares \d\d% of its runs of words with dev\.tsv, row 2", near.reason)
    near = Contamination(against=(str(evaluation),), ngram=30)(item(QUESTION.replace("불렀다", "불렀네")))
    assert isinstance(near, Rejected)
    assert re.fullmatch(r"nearly dev\.tsv, row 2 \(similarity 0\.[89]\d\)", near.reason)
    for text in ("짧은 글", "https://example.org/one", "붉은 등대와 항구와 어부의 노래에 관한 시를 한 편 써 주세요."):
        row = item(text)
        assert step(row) is row


def test_evaluation_columns_and_files(evaluation, tmp_path):
    more = tmp_path / "more.jsonl"
    text = "The lighthouse keeper counted nine ships before the storm closed the harbour for a week."
    more.write_text(json.dumps({"messages": [{"role": "user", "content": text}], "n": 1}), encoding="utf-8")
    step = Contamination(against=(str(evaluation), str(more)))
    assert step(item(f"Read: {text} How many ships?")).reason.endswith("more.jsonl, row 1")
    assert isinstance(step(item(QUESTION)), Rejected)
    folder = Contamination(against=(str(tmp_path),))
    assert isinstance(folder(item(QUESTION)), Rejected)
    assert pickle.loads(pickle.dumps(step)) == step
    with pytest.raises(InputError, match=r"dev\.tsv, row 1.* lacks the column 'question': its columns are 'id',"):
        Contamination(against=(str(evaluation),), columns=("question",))(item(QUESTION))
    with pytest.raises(InputError, match="no text of at least 20 letters"):
        Contamination(against=(str(evaluation),), columns=("label",))(item(QUESTION))
    with pytest.raises(InputError, match="does not exist"):
        Contamination(against=(str(tmp_path / "none.tsv"),))
    with pytest.raises(InputError, match="got no evaluation file"):
        Contamination()


def test_overlap_is_brute_forces(evaluation):
    """Shares of word runs, against sets of tuples."""
    rng = random.Random(2)
    texts = [sentence(rng, 30) for _ in range(40)]
    path = evaluation.with_name("many.jsonl")
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    step = Contamination(against=(str(path),), ngram=4, overlap=0.3, threshold=0.95)

    def runs(text):
        words = text.split()
        return {tuple(words[place : place + 4]) for place in range(len(words) - 3)}

    hits = 0
    for _ in range(200):
        words = sentence(rng, 30).split()
        length, source = rng.randrange(0, 25), rng.choice(texts).split()
        text = " ".join(words[:15] + source[:length] + words[15:])
        share = max(len(runs(text) & runs(each)) / min(len(runs(text)), len(runs(each))) for each in texts)
        result = step(item(text))
        assert isinstance(result, Rejected) == (share >= 0.3)
        if isinstance(result, Rejected):
            hits += 1
            assert result.reason.startswith(f"shares {100 * share:.0f}% ")
    assert 20 < hits < 190


def test_real_evaluation_sets_find_themselves(assets):
    """Every long enough text of KoBEST's and MMLU's files, as a training row; and few others."""
    mmlu, kobest = assets / "data/en/mmlu", assets / "data/ko/kobest"
    step = Contamination(against=(str(mmlu), str(kobest / "BoolQ.test.tsv")))
    rows = [json.loads(line) for line in (mmlu / "zero_shot_mmlu_val.json").read_text(encoding="utf-8").splitlines()]
    for row in rows[::40]:
        assert isinstance(step(item(row["output"], instruction=row["input"])), Rejected)
    lines = (kobest / "BoolQ.test.tsv").read_text(encoding="utf-8").splitlines()[1:]
    for line in lines[::40]:
        assert isinstance(step(item("네", instruction=line.split("\t")[1])), Rejected)
    training = json.loads((assets / "data/ko/ko_sharegpt_deepl_translate_cleaned_v2.json").read_text(encoding="utf-8"))
    assert sum(isinstance(step(item(row["output"], instruction=row["input"])), Rejected) for row in training) == 0
