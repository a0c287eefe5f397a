"""Files are whole or not there."""

from __future__ import annotations

import stat

import pytest

from jindo_core import files
from jindo_core.errors import InputError


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a": ' * 200_000, '{"a": ' + "9" * 5000 + "}", "{", "\udcff"])
def test_json_that_can_not_be_read_is_named(tmp_path, text):
    file = tmp_path / "config.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"config\.json is not valid JSON") as caught:
        files.read_json(file)
    assert "\n" not in str(caught.value)


def test_a_file_that_can_not_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nothing can't be read .No such file"):
        files.read_bytes(tmp_path / "nothing")


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "x.json"
    files.write_atomically(file, b"old")
    assert stat.S_IMODE(file.stat().st_mode) & 0o600 == 0o600

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomically(file, b"new")
    assert file.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
