"""What a killed run left is taken up; another run's, a damaged one's or a living one's is not."""

from __future__ import annotations

import pytest

from jindo_core.errors import InputError
from jindo_core.part_file import PartFile


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".out.jsonl.part"


def filled(path, rows):
    with PartFile(path, "a") as part:
        part.append(rows)
    return path.read_bytes()


def test_results_come_back_in_order(path):
    rows = [{"text": "하나\n둘"}, {"text": None}, {"loss": 0.1234567890123456789}]
    filled(path, rows[:1])
    with PartFile(path, "a") as part:
        assert part.done == 1
        part.append(rows[1:])
        assert part.done == 3
        assert list(part.results()) == [{"row": i, **row} for i, row in enumerate(rows, 1)]
        part.remove()
    assert not path.exists()


def test_whatever_byte_a_kill_cuts_at_whole_rows_stay(path):
    whole = filled(path, [{"text": "가"}, {"text": "나"}, {"text": "다라마"}])
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        with PartFile(path, "a") as part:
            kept = max(sum(end <= cut for end in ends) - 1, 0)
            assert part.done == kept
            part.append([{"text": "새"}])
            assert [row["text"] for row in part.results()] == [*["가", "나", "다라마"][:kept], "새"]


def test_another_run_is_refused_and_can_be_thrown_away(path):
    before = filled(path, [{"text": "가"}])
    with pytest.raises(InputError, match="other settings, data or weights: run that one to its end, or --restart"):
        PartFile(path, "b")
    assert path.read_bytes() == before
    with PartFile(path, "b", restart=True) as part:
        assert part.done == 0
        assert list(part.results()) == []


@pytest.mark.parametrize("line", [b'{"row": 3}\n', b"\xff\n", b"[]\n", b'{"row": 2\n'])
def test_damage_is_named(path, line):
    whole = filled(path, [{"text": "가"}])
    path.write_bytes(whole + line)
    with pytest.raises(InputError, match=r"is damaged \(no result of row 2\): --restart throws it away"):
        PartFile(path, "a")
    assert path.read_bytes() == whole + line


def test_one_process_at_a_time(path):
    with PartFile(path, "a"), pytest.raises(InputError, match="being written by another process"):
        PartFile(path, "a", restart=True)
    PartFile(path, "a").close()


def test_a_place_that_can_not_be_written_to(tmp_path):
    with pytest.raises(InputError, match=r"can't be written to \(No such file or directory\)"):
        PartFile(tmp_path / "nowhere" / "x", "a")
