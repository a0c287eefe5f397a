"""Tokenized rows on disk: what is read is what was encoded; the cache's keys, damage, pruning and lack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import pytest

from jindo_core.data import store
from jindo_core.data.examples import Encoded, Example
from jindo_core.data.formats import detect_format
from jindo_core.data.readers import open_rows
from jindo_core.data.store import Selection, tokenize
from jindo_core.errors import InputError


@dataclass
class Characters:
    """An encoder of characters: the instruction is not learnt, "x" is nothing to learn, and 12 are the most."""

    fingerprint: str = "characters"
    calls: list[int] = field(default_factory=list)

    def encode(self, records):
        self.calls.append(len(records))
        return [self._one(record) for record in records]

    def _one(self, record):
        prompt, answer = ([ord(c) for c in text] for text in (record.instruction, record.output))
        ids, labels = (prompt + answer)[:12], ([-100] * len(prompt) + answer)[:12]
        return Encoded(None if record.output == "x" else Example(ids, labels), len(prompt + answer) > 12, record.row)


def write(path, rows):
    path.write_text("".join(json.dumps({"instruction": a, "output": b}) + "\n" for a, b in rows))
    return path


ROWS = [("가나", "abc"), ("ask", "x"), ("q", "a long answer that is cut"), ("", "\x00z"), ("nothing", "x")]


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache" / "tokenized"


def make(path, cache, encoder=None, **more):
    source = open_rows(str(path))
    return tokenize(source, detect_format(source), encoder or Characters(), cache=cache, **more)


def plain(found):
    return tuple(list(rows) for rows in (found.filled, found.empty, found.cut, found.shortened))


def losses(rows):
    return plain(rows.losses(np.arange(len(rows))))


def stores(cache):
    return sorted(cache.glob("*.rows"))


@pytest.mark.parametrize("cached", [True, False])
def test_what_is_read_is_what_was_encoded(cached, data, cache, monkeypatch):
    monkeypatch.setattr(store, "_CHUNK", 2)
    encoder, said = Characters(), []
    rows = make(data, cache if cached else None, encoder, on_progress=lambda *args: said.append(args))
    assert encoder.calls == [2, 2, 1]
    assert len(rows) == 5
    assert rows.lengths.tolist() == [5, 0, 12, 2, 0]
    assert rows[0] == Example([ord("가"), ord("나"), 97, 98, 99], [-100, -100, 97, 98, 99])
    assert rows[1] == Example([], [])
    assert rows[3] == Example([0, 122], [0, 122]), "an id of 0 is an id"
    assert rows[-3:] == [rows[2], rows[3], rows[4]]
    assert losses(rows) == ([], [2, 5], [3], [])
    assert [done for done, _, _ in said] == [2, 4, 5]
    assert said[-1][1] <= said[-1][2] == data.stat().st_size
    assert bool(cache.exists()) == cached
    assert not list(cache.parent.rglob("*.part"))


def test_long_rows_are_encoded_a_few_at_a_time(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(store, "_CHUNK_CHARACTERS", 10)
    encoder = Characters()
    path = write(tmp_path / "a.jsonl", [("four", "four"), ("ab", "c"), ("d" * 30, "e"), ("f", "g")])
    assert len(make(path, cache, encoder)) == 4
    assert encoder.calls == [2, 1, 1]


_GROWTH = """
import sys
from pathlib import Path
from jindo_core.data.examples import Encoder
from jindo_core.data.formats import detect_format
from jindo_core.data.readers import open_rows
from jindo_core.data.store import tokenize
from jindo_core.data.templates import load_template
from jindo_core.tokenizer import load_tokenizer
def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:"))) / 1024
tokenizer = load_tokenizer(Path(sys.argv[1]))
encoder = Encoder(tokenizer, load_template("alpaca", tokenizer), cutoff_len=256, train_on_inputs=False)
for path in sys.argv[2:]:
    before, source = peak(), open_rows(path)
    rows = tokenize(source, detect_format(source), encoder, cache=None)
print(peak() - before, len(rows))
"""


def test_memory_does_not_grow_with_long_rows(tmp_path, stories15m):
    """A chunk of 1,024 of them took 382 MB for 60."""
    small = write(tmp_path / "small.jsonl", [("q", "a")])
    big = write(tmp_path / "big.jsonl", [(f"q{i}", "The quick brown fox, 한국어 문장. " * 6700) for i in range(60)])
    command = [sys.executable, "-c", _GROWTH, str(stories15m), str(small), str(big)]
    growth, count = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(count) == 60
    assert float(growth) < 120


def test_why_a_row_is_left_out_and_which_side_is_cut(data, cache):
    """Each record has its reasons, kept in the file."""

    class Sided(Characters):
        def _one(self, record):
            sides = {1: (True, False), 2: (True, False), 3: (False, True), 4: (True, True), 5: (False, False)}
            example = None if record.output == "x" else Example([1], [1])
            return Encoded(example, sides[record.row][0], record.row, sides[record.row][1])

    assert losses(make(data, cache, Sided())) == ([2], [5], [1, 4], [3, 4])
    assert losses(make(data, cache, Sided())) == ([2], [5], [1, 4], [3, 4]), "and are read from there"


def test_the_second_time_nothing_is_encoded(data, cache):
    first, encoder = make(data, cache), Characters()
    second = make(data, cache, encoder)
    assert encoder.calls == []
    assert (first.from_cache, second.from_cache) == (False, True)
    assert list(second) == list(first)
    assert losses(second) == losses(first)
    (path,) = stores(cache)
    assert path.stat().st_mode & 0o077 == 0, "rows are their owner's alone"


def test_the_key_is_content_not_place_or_date(data, cache, tmp_path):
    make(data, cache)
    os.utime(data, (1, 1))
    assert make(data, cache).from_cache
    data.rename(tmp_path / "other.jsonl")
    assert make(tmp_path / "other.jsonl", cache).from_cache
    assert not make(write(data, [*ROWS[:-1], ("nothing", "y")]), cache).from_cache
    assert not make(data, cache, Characters("other")).from_cache
    source = open_rows(str(data))
    mapped = detect_format(source, "alpaca:instruction=output")
    assert not tokenize(source, mapped, Characters(), cache=cache).from_cache
    assert len(stores(cache)) == 4


def test_other_code_is_another_key(data, cache, monkeypatch):
    make(data, cache)
    monkeypatch.setattr(store, "_code", lambda: "edited")
    assert not make(data, cache).from_cache


def damage_byte(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b"", lambda b: b[:10], lambda b: b[:-1], lambda b: b + b"\0", lambda b: b[4:],
        lambda b: damage_byte(b, 0), lambda b: damage_byte(b, 80), lambda b: damage_byte(b, len(b) - 1),
        lambda b: damage_byte(b, len(b) - 12), lambda b: damage_byte(b, len(b) - 30), lambda b: b"\xff" * len(b),
    ],
)  # fmt: skip
def test_a_damaged_store_is_noticed_and_made_anew(damage, data, cache):
    expected = list(make(data, cache))
    (path,) = stores(cache)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    said = []
    again = make(data, cache, say=said.append)
    assert said == ["tokenized rows of an earlier run are damaged: they are made anew"]
    assert not again.from_cache
    assert list(again) == expected
    assert path.read_bytes() == whole
    assert make(data, cache).from_cache


def test_another_keys_store_under_this_name_is_not_taken(data, cache):
    make(data, cache)
    (mine,) = stores(cache)
    make(data, cache, Characters("other"))
    (other,) = (path for path in stores(cache) if path != mine)
    mine.write_bytes(other.read_bytes())
    assert not make(data, cache).from_cache


def test_two_runs_at_once_are_both_right(data, cache, monkeypatch):
    monkeypatch.setattr(store, "_CHUNK", 1)
    barrier = threading.Barrier(2)

    class Slow(Characters):
        def encode(self, records):
            if not self.calls:
                barrier.wait(10)
            return super().encode(records)

    found = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: make(data, cache, Slow())})) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(found[0]) == list(found[1])
    assert len(stores(cache)) == 1
    assert not list(cache.glob(".*"))
    assert make(data, cache).from_cache


def test_a_failed_run_leaves_nothing(data, cache):
    class Failing(Characters):
        def encode(self, records):
            raise InputError("no")

    with pytest.raises(InputError, match=r"^no$"):
        make(data, cache, Failing())
    write(data, [*ROWS, ("a", 3)])
    with pytest.raises(InputError, match="row 6"):
        make(data, cache)
    assert list(cache.iterdir()) == []


def test_a_killed_run_leaves_a_part_that_is_no_store(data, cache):
    """And the next but one day's run removes it."""
    code = (
        "import os, sys; from pathlib import Path; from jindo_core.data import store; "
        "from jindo_core.data.formats import detect_format; from jindo_core.data.readers import open_rows\n"
        "class Kill:\n"
        "    fingerprint = 'characters'\n"
        "    def encode(self, records): os.kill(os.getpid(), 9)\n"
        "source = open_rows(sys.argv[1])\n"
        "store.tokenize(source, detect_format(source), Kill(), cache=Path(sys.argv[2]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(data), str(cache)], check=False)
    assert done.returncode == -9
    (part,) = cache.glob(".*.part")
    assert not make(data, cache).from_cache
    assert part.exists(), "it may be another run's, at work"
    os.utime(part, (1, 1))
    make(write(data, ROWS[:2]), cache)
    assert not part.exists()


def test_the_least_used_stores_go_first(data, cache, monkeypatch):
    for number in range(4):
        make(data, cache, Characters(str(number)))
    size = stores(cache)[0].stat().st_size
    assert {path.stat().st_size for path in stores(cache)} == {size}
    for age, path in enumerate(stores(cache)):
        os.utime(path, (time.time() - 100 - age,) * 2)
    used = make(data, cache, Characters("2"))
    assert used.from_cache
    monkeypatch.setattr(store, "KEPT_BYTES", 2 * size)
    said = []
    make(data, cache, Characters("new"), say=said.append)
    assert said == ["3 of the tokenized data sets kept for next runs removed, the oldest: 0.0 GB"]
    assert len(stores(cache)) == 2
    assert make(data, cache, Characters("2")).from_cache
    assert used[0] == make(data, cache, Characters("2"))[0]
    monkeypatch.setattr(store, "KEPT_BYTES", 0)
    last = make(data, cache, Characters("last"))
    assert len(stores(cache)) == 1, "the one in use stays"
    assert len(last) == 5


def test_a_cache_that_can_not_be_written_is_said_and_done_without(data, tmp_path):
    (tmp_path / "file").touch()
    said = []
    rows = make(data, tmp_path / "file" / "tokenized", say=said.append)
    assert len(rows) == 5
    (message,) = said
    assert message.startswith("tokenized rows are not kept for the next run: their cache can't be written to (")


def test_no_room_is_one_line(data, cache, monkeypatch):
    def full(*_, **__):
        return open("/dev/full", "r+b", buffering=0)

    monkeypatch.setattr(store.os, "fdopen", full)
    monkeypatch.setattr(store.tempfile, "TemporaryFile", full)
    monkeypatch.setattr(store, "_usable", lambda *_: True)
    cache.mkdir(parents=True)
    for place, where in ((cache, r"the cache \(JINDO_CACHE\)"), (None, r"temporary files \(TMPDIR\)")):
        with pytest.raises(InputError, match=rf"can't be written to .*{where} \(No space left on device\): make room"):
            make(data, place)
    assert list(cache.iterdir()) == []


def test_a_file_that_changes_while_it_is_read_is_refused(data, cache):
    class Meddling(Characters):
        def encode(self, records):
            write(data, ROWS[:3])
            return super().encode(records)

    with pytest.raises(InputError, match="changed while it was read: start the run again"):
        make(data, cache, Meddling())
    assert list(cache.iterdir()) == []


def test_a_store_cut_short_in_use_is_an_error(data, cache):
    rows = make(data, cache)
    os.truncate(stores(cache)[0], 4)
    with pytest.raises(InputError, match="cut short while it was in use"):
        rows[2]


def test_a_selection_of_several_sources(data, cache, tmp_path):
    other = write(tmp_path / "more.jsonl", [("p", "one"), ("p", "x"), ("p", "three")])
    first, second = make(data, cache), make(other, cache)
    chosen = Selection([first, second], np.array([7, 3, 6, 4, 2, 5]))
    assert list(chosen) == [first[3], first[2], second[2], second[0]], "source by source, in the order asked for"
    assert chosen.lengths.tolist() == [len(example.input_ids) for example in chosen]
    assert chosen.bounds == [(0, 2), (2, 4)]
    assert [plain(part) for part in chosen.losses] == [([], [5], [3], []), ([], [2], [], [])]
    assert chosen.asked == [3, 3]
    assert chosen[-1] == chosen[3] == chosen[3:][0]
    with pytest.raises(IndexError):
        chosen[4]
    nothing = Selection([first, second], np.zeros(0, np.int64))
    assert (len(nothing), nothing.bounds) == (0, [(0, 0), (0, 0)])
