"""The file from which an evaluation goes on: torn anywhere, of other settings, of two processes at once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from jindo_core.errors import InputError
from jindo_core.eval_journal import Journal

SETTINGS = {"tasks": ["perplexity"], "limit": None, "batch_size": 8}
# Figures whose shortest decimal form is long, or tiny.
ROWS = [[[-12.30000000000001, False], [-0.1 - 0.2, True]], [[-5e-324, True]], [[-1.7976931348623157e308, False]]]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.json.part"


def fill(path, count=3):
    with Journal(path, SETTINGS) as journal:
        for number, rows in enumerate(ROWS[:count]):
            journal.add("nf4/perplexity", number, rows)


def test_what_was_done_is_read_back_bit_for_bit(path):
    fill(path)
    with Journal(path, SETTINGS) as journal:
        assert journal.resumed == 3
        assert [journal.known("nf4/perplexity", i, len((*ROWS, [])[i])) for i in range(4)] == [*ROWS, None]
        assert journal.known("none/perplexity", 0, 2) is None


def test_cut_off_at_any_byte_it_goes_on_from_the_last_whole_line(path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # some hundreds of them
    fill(path)
    content = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        with Journal(path, SETTINGS) as journal:
            done = max(sum(end <= size for end in ends) - 1, 0)
            assert journal.resumed == done
            for number in range(done, 3):
                journal.add("nf4/perplexity", number, ROWS[number])
        assert path.read_bytes() == content


def test_a_batch_of_another_size_is_damage(path):
    fill(path)
    with Journal(path, SETTINGS) as journal, pytest.raises(InputError, match="has 2 rows in a batch of 3"):
        journal.known("nf4/perplexity", 0, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    for line in (b'{"part": "p", "batch": 0, "rows": [[1]]}\n', b'{"part": "p"}\n', b"null\n"):
        path.write_bytes(lines[0] + line + lines[1])
        with pytest.raises(InputError, match="or was damaged"):
            Journal(path, SETTINGS)


def test_other_settings_are_refused_by_name_unless_overwritten(path):
    fill(path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"of a run with another limit, batch_size: take its settings"):
        Journal(path, {**SETTINGS, "limit": 5, "batch_size": 4})
    assert path.read_bytes() == before
    with Journal(path, {**SETTINGS, "limit": 5}, overwrite=True) as journal:
        assert journal.resumed == 0
    with Journal(path, {**SETTINGS, "limit": 5}) as journal:
        assert journal.known("nf4/perplexity", 0, 2) is None


def test_overwrite_keeps_what_is_of_the_same_settings(path):
    fill(path)
    with Journal(path, SETTINGS, overwrite=True) as journal:
        assert journal.resumed == 3


@pytest.mark.parametrize(
    "content", [b"my only copy", b"my only copy\n", b'{"kind": "other"}\n', b"[1]\n", b"\xff\n", b'{"kind": 1}\nx\n']
)
def test_a_file_that_is_none_is_left_alone(path, content):
    path.write_bytes(content)
    with pytest.raises(InputError, match="is no record of an evaluation"):
        Journal(path, SETTINGS)
    assert path.read_bytes() == content
    with Journal(path, SETTINGS, overwrite=True) as journal:
        journal.add("p", 0, ROWS[0])
    with Journal(path, SETTINGS) as journal:
        assert journal.resumed == 1


def test_two_processes_do_not_share_it(path):
    with Journal(path, SETTINGS):
        code = (
            "import sys; from pathlib import Path; from jindo_core.eval_journal import Journal; "
            "from jindo_core.errors import InputError\n"
            "try: Journal(Path(sys.argv[1]), {})\n"
            "except InputError as error: print(error)"
        )
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
        assert "is being written by another evaluation" in done.stdout


def test_a_full_disk_keeps_what_is_there(path, monkeypatch):
    fill(path, 1)

    def full(descriptor, data):
        raise OSError(28, "No space left on device")

    with Journal(path, SETTINGS) as journal:
        monkeypatch.setattr("os.write", full)
        with pytest.raises(InputError, match=r"No space left on device\): make room"):
            journal.add("nf4/perplexity", 1, ROWS[1])
    monkeypatch.undo()
    with Journal(path, SETTINGS) as journal:
        assert journal.resumed == 1


def test_finished_it_goes(path):
    with Journal(path, SETTINGS) as journal:
        journal.finish()
    assert not path.exists()


def test_without_a_path_nothing_is_kept():
    with Journal(None, SETTINGS) as journal:
        journal.add("p", 0, ROWS[0])
        assert journal.known("p", 0, 2) is None
        journal.finish()


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"can't be written \(No such file or directory\)"):
        Journal(tmp_path / "gone" / "x.part", SETTINGS)


def test_it_is_lines_of_json(path):
    fill(path, 2)
    header, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert header == {"kind": "jindo-core evaluation", "version": 1, "settings": SETTINGS}
    assert rows[0] == {"part": "nf4/perplexity", "batch": 0, "rows": ROWS[0]}
