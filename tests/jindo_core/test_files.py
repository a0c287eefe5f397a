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


def test_what_files_hold_is_their_digest(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    content = bytes(range(256)) * (6 << 12)  # 6 MiB: not read whole
    for folder in (one, other):
        folder.mkdir()
        (folder / "config.json").write_bytes(b"{}")
        (folder / "model.bin").write_bytes(content)
    assert files.content_digest(one) == files.content_digest(other)
    assert files.content_digest(one / "model.bin") != files.content_digest(one)
    for changed in (b"x" + content[1:], content[:-1] + b"x", content[::-1], content + b"x"):
        (other / "model.bin").write_bytes(changed)
        assert files.content_digest(one) != files.content_digest(other)


@pytest.mark.parametrize("nameless", [True, False])
def test_until_it_is_whole_a_file_has_no_name(tmp_path, monkeypatch, nameless):
    if not nameless:  # as on NFS
        monkeypatch.setattr(files.os.path, "isdir", lambda path: False)
    with files.replacing(tmp_path / "x.json") as file:
        file.write(b"new")
        assert len(list(tmp_path.iterdir())) == (0 if nameless else 1)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x.json", b"new")]
    assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) & 0o600 == 0o600


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
