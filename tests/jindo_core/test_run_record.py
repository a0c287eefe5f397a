"""The output folder is looked at before anything is read."""

from __future__ import annotations

import os
import shutil
import types

import pytest

from jindo_core.config import resolve_train_config
from jindo_core.errors import InputError
from jindo_core.run_record import ROOM, choose_output_dir


def chosen(folder):
    config, _, _ = resolve_train_config({"output_dir": str(folder)})
    return choose_output_dir(config, named=True)


def test_a_name_that_no_file_could_hold_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"oe\\udcff' is no UTF-8"):
        chosen(tmp_path / os.fsdecode(b"oe\xff"))
    assert chosen(tmp_path / "봄") == tmp_path / "봄"


def test_a_folder_without_room_is_refused_and_how_much_there_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=ROOM - 1))
    with pytest.raises(InputError, match=r"has 4\.2 MB free, expected at least 4\.2: make room"):
        chosen(tmp_path / "out")
    assert not (tmp_path / "out").exists()
