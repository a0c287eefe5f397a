"""Tokenizing beside `datasets.map` with its best number of processes: `pytest bench/test_tokenizing.py`."""

from __future__ import annotations

import os

import pytest

from bench import tokenizing
from bench.conftest import ROOT
from jindo_core.data.records import bundled_path
from jindo_core.embedded import embedded_model

ROWS, ROUNDS = 3_000, 3


@pytest.fixture(scope="module")
def assets():
    from pathlib import Path

    return Path(os.environ.get("JINDO_ASSETS", ROOT.parent / "shared" / "assets"))


@pytest.fixture(scope="module")
def rows(assets, tmp_path_factory):
    """Real Korean and English rows where they are, else the bundled ones."""
    real = [
        assets / "data/ko/ko_sharegpt_deepl_translate_cleaned_v2.json",
        assets / "data/en/orca_dpo_pairs_validation.jsonl",
    ]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    tokenizing.write_rows([source for source in real if source.exists()] or [bundled_path()], path, ROWS)
    return path


@pytest.mark.parametrize("train_on_inputs", [True, False], ids=["whole", "answers"])
@pytest.mark.parametrize("kind", tokenizing.KINDS)
def test_tokenizing(kind, train_on_inputs, rows, assets, tmp_path, capsys):
    model = embedded_model() if kind == "smollm2" else assets / "models" / "stories15M-hf"
    if not model.exists():
        pytest.skip("needs a LLaMA's tokenizer.model; set JINDO_ASSETS")
    few = tmp_path / "few.jsonl"
    few.write_bytes(b"".join(rows.read_bytes().splitlines(keepends=True)[:500]))
    wrong = list(tokenizing.differences(kind, model, few, train_on_inputs))
    assert not wrong, f"{len(wrong)} rows differ, so it is not the same work: {wrong[0][:300]}"
    found = tokenizing.compare(kind, model, rows, rounds=ROUNDS, train_on_inputs=train_on_inputs)
    with capsys.disabled():
        rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in found["rates"].items())
        ratios = " ".join(f"{ratio:.2f}" for ratio in sorted(found["ratios"]))
        print(f"\n{kind}: rows/s: {rates}; ours over {found['best']}: {found['ratio']:.2f} ({ratios})")
    assert found["ratio"] >= 1, f"slower than {found['best']}: {found}"
