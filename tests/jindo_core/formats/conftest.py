"""Checkpoints that a test may break, and the one way in which they are refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from jindo_core.errors import InputError
from jindo_core.loader import load_model


@pytest.fixture
def copy(stories260k, tmp_path):
    """A folder in Hugging Face's layout, and its tensors."""
    folder = tmp_path / "model"
    shutil.copytree(stories260k, folder)
    for path in [folder, *folder.iterdir()]:
        path.chmod(0o755)
    return folder, load_file(folder / "model.safetensors")


@pytest.fixture
def refused():
    """Loading a path raises an InputError of one line that matches."""

    def check(path, message):
        with pytest.raises(InputError, match=message) as caught:
            load_model(path, dtype="fp32", device="cpu")
        assert "\n" not in str(caught.value)

    return check


@pytest.fixture
def write_index():
    def write(folder, kind, weight_map):
        (folder / f"{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return write


@pytest.fixture
def ids():
    """Token ids within any vocabulary here, [2, 24]."""
    return torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(0))
