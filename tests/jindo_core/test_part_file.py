"""What a stopped run left is taken up, torn anywhere; another run's, a damaged one or a living one's is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from jindo_core.errors import InputError
from jindo_core.part_file import PartFile

SETTINGS = {"tasks": ("perplexity",), "limit": None, "batch_size": 8}
# Figures whose shortest decimal form is long, or tiny; a text.
BATCHES = {
    "nf4/0": [[-12.30000000000001, False], [-0.1 - 0.2, True]],
    "nf4/1": [[-5e-324, True], [-1.7976931348623157e308, False]],
    "1": [{"text": "하나\n둘\u2028"}],
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.json.part"


def opened(path, settings=SETTINGS, **more):
    return PartFile(path, settings, flag="--overwrite", **more)


def fill(path, count=3):
    with opened(path) as part:
        for key, rows in list(BATCHES.items())[:count]:
            part.add(key, rows)
    return path.read_bytes()


def test_what_was_done_is_read_back_bit_for_bit(path):
    fill(path, 2)
    with opened(path) as part:
        assert part.resumed == 2
        assert part.get("1") is None
        part.add("1", BATCHES["1"])
        assert {key: part.get(key) for key in BATCHES} == BATCHES
        assert list(part.results()) == [row for rows in BATCHES.values() for row in rows]


def test_cut_off_at_any_byte_it_goes_on_from_the_last_whole_line(path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # some hundreds of them
    content = fill(path)
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        with opened(path) as part:
            done = max(sum(end <= size for end in ends) - 1, 0)
            assert part.resumed == done
            for key in list(BATCHES)[done:]:
                part.add(key, BATCHES[key])
            assert {key: part.get(key) for key in BATCHES} == BATCHES
        assert path.read_bytes() == content


def test_damage_at_any_byte_is_refused(path):
    content = fill(path)
    for place in range(content.rindex(b"\n", 0, -1) + 1):  # of all lines but the last, which may be torn
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(InputError, match=r"is no part file, or was damaged \(byte \d+\): give another"):
            opened(path)


def test_a_surrogate_in_a_name_is_kept(path):
    for resumed in (0, 1):
        with opened(path, {"name": "\udcff"}) as part:
            assert part.resumed == resumed
            part.add("a", ["\udcfe"])
            assert part.get("a") == ["\udcfe"]


def test_other_settings_are_refused_by_name_unless_overwritten(path):
    before = fill(path)
    with pytest.raises(InputError, match=r"with another limit, batch_size: take its settings .* or --overwrite to"):
        opened(path, {**SETTINGS, "limit": 5, "batch_size": 4})
    assert path.read_bytes() == before
    for expected in (0, 1):
        with opened(path, {**SETTINGS, "limit": 5}, overwrite=True) as part:
            assert part.resumed == expected
            part.add("nf4/0", [])


def test_overwrite_keeps_what_is_of_the_same_settings_and_restart_does_not(path):
    fill(path)
    for more, resumed in (({"overwrite": True}, 3), ({"restart": True}, 0), ({}, 0)):
        with opened(path, **more) as part:
            assert part.resumed == resumed


@pytest.mark.parametrize("content", [b"my only copy", b"my only copy\n", b'{"kind": "other"}\n', b"[1]\n", b"\xff\n"])
@pytest.mark.parametrize("way", ["overwrite", "restart"])
def test_a_file_that_is_none_is_left_alone_unless_told(path, content, way):
    path.write_bytes(content)
    with pytest.raises(InputError, match="is no part file"):
        opened(path)
    assert path.read_bytes() == content
    with opened(path, **{way: True}) as part:
        part.add("a", BATCHES["1"])
    with opened(path) as part:
        assert part.resumed == 1


def test_two_processes_do_not_share_it(path):
    with opened(path):
        code = (
            "import sys; from pathlib import Path; from jindo_core.part_file import PartFile; "
            "from jindo_core.errors import InputError\n"
            "try: PartFile(Path(sys.argv[1]), {}, flag='--restart', restart=True)\n"
            "except InputError as error: print(error)"
        )
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
        assert "is being written by another process: wait for it" in done.stdout
    with opened(path) as part:
        assert part.resumed == 0


def test_a_full_disk_keeps_what_is_there(path, monkeypatch):
    fill(path, 1)
    write, room = os.write, [20]

    def full(descriptor, data):
        if not room:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[: room.pop()])

    with opened(path) as part:
        monkeypatch.setattr("os.write", full)
        with pytest.raises(InputError, match=r"No space left on device\): make room"):
            part.add("nf4/1", BATCHES["nf4/1"])
    monkeypatch.undo()
    with opened(path) as part:
        assert part.resumed == 1
        assert part.get("nf4/0") == BATCHES["nf4/0"]


def test_finished_it_goes(path):
    with opened(path) as part:
        part.remove()
    assert not path.exists()


def test_without_a_path_nothing_is_kept():
    with opened(None) as part:
        part.add("a", BATCHES["1"])
        assert part.get("a") is None
        part.remove()


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"can't be written \(No such file or directory\): give another"):
        opened(tmp_path / "gone" / "x.part")


def test_it_is_lines_of_json(path):
    header, first, *_ = [json.loads(line) for line in fill(path).split(b"\n")[:-1]]
    assert header == {"part_file": 1, **SETTINGS, "tasks": ["perplexity"], "crc32": header["crc32"]}
    assert first == {"key": "nf4/0", "rows": BATCHES["nf4/0"], "crc32": first["crc32"]}
