"""The settings of `quantize`, `merge` and `export`, and sizes as text."""

from __future__ import annotations

import pytest

from jindo_core.convert_config import ExportConfig, MergeConfig, QuantizeConfig
from jindo_core.errors import InputError
from jindo_core.settings import settings, size_in_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * 10**9), ("400MB", 4 * 10**8), ("400 mb", 4 * 10**8), ("2GiB", 2**31), ("1.5kb", 1500), ("7", 7),
        ("10K", 10_000), ("1T", 10**12), ("", None), ("0", None), ("-1GB", None), ("4 GB", 4 * 10**9), ("GB", None),
        ("1e9", None), ("0.5", None),
    ],
)  # fmt: skip
def test_sizes(text, size):
    assert size_in_bytes(text) == size


def test_an_optional_choice_is_a_choice():
    known = settings(ExportConfig)
    assert known["onto"].choices == ("original", "nf4")
    assert known["onto"].optional
    assert known["dtype"].choices == ("f16", "bf16", "f32", "q8_0")
    assert known["double_quant"].kind == "bool"


def test_defaults():
    assert QuantizeConfig(output_dir="x").double_quant
    assert MergeConfig(output_dir="x", lora_weights="a", onto="nf4").double_quant is None
    with pytest.raises(InputError, match="--onto: got nothing"):
        MergeConfig(output_dir="x", lora_weights="a")
    with pytest.raises(InputError, match="--eval_rows: got -1"):
        MergeConfig(output_dir="x", lora_weights="a", onto="nf4", eval_rows=-1)
