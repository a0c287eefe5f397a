"""Files are whole or not there."""

from __future__ import annotations

import stat

import pytest

from jindo_core import files


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
