"""`jindo-core tune`: what it measures, what it writes, and that the dispatcher reads it."""

from __future__ import annotations

import json

import pytest
import torch

from jindo_core import embedded, tune
from jindo_core.cli.main import main
from jindo_core.kernels import crossovers, dispatch, native

pytestmark = pytest.mark.skipif(native.library() is None, reason="needs the C kernels: there is nothing to compare")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JINDO_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "CPU_SHAPES", ((64, 128), (128, 64)))
    monkeypatch.setattr(tune, "ROTATED_BYTES", 1 << 16)
    crossovers.forget()
    yield tmp_path
    crossovers.forget()


@pytest.fixture
def seconds(monkeypatch):
    """seconds(f): the clock says f(name, rows) instead of the time taken; the calls still run once."""

    def install(say):
        def medians(calls, device, rounds):
            rows = None
            for call in calls.values():
                rows = call(0).shape[0]
            return {name: say(name, rows) for name in calls}

        monkeypatch.setattr(tune, "paired_medians", medians)

    return install


def test_a_dry_run_measures_and_writes_nothing(capsys, own_cache):
    assert main(["tune", "--device", "cpu", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "64 x 128" in out
    assert "cpu gemv_max_rows:" in out
    assert "nothing written" in out
    assert list(own_cache.iterdir()) == []


def test_the_row_is_written_and_read_by_the_dispatcher(seconds, capsys, own_cache):
    seconds(lambda name, rows: 1.0 if name == "reference" else rows / 4.5)
    assert main(["tune", "--device", "cpu"]) == 0
    written = json.loads((own_cache / "crossovers.json").read_text())
    assert set(written) == {"cpu"}
    assert written["cpu"]["gemv_max_rows"] == 4
    assert written["cpu"]["measured"] is True
    assert {"date", "machine", "torch"} <= set(written["cpu"])
    x = torch.zeros(1)
    assert dispatch.choose("lora_matmul", x, rows=4) == "cpu"
    assert dispatch.choose("lora_matmul", x, rows=5) == "reference"
    assert "(was 8, estimated)" in capsys.readouterr().out
    assert main(["tune", "--device", "cpu", "--dry_run"]) == 0
    assert "(was 4, measured)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("by_rows", "limit"),
    [({1: 2.0, 2: 1.5, 4: 0.9, 8: 1.2}, 2), ({1: 0.9, 2: 2.0}, 0), ({1: 1.2, 2: 1.01}, 1), ({1: 2.0, 2: 3.0}, 2)],
)
def test_the_crossover_is_where_the_gain_first_ends(by_rows, limit):
    assert tune._crossover([by_rows]) == limit


def test_shapes_are_averaged_geometrically():
    assert tune._crossover([{1: 4.0, 2: 0.5}, {1: 0.5, 2: 2.0}]) == 1


def test_rows_of_other_devices_stay(seconds, own_cache):
    row = '{"gemv_max_rows": 3, "fused_max_rows": 8, "measured": true}'
    (own_cache / "crossovers.json").write_text(f'{{"cuda-8.6": {row}}}')
    seconds(lambda name, rows: 1.0)
    found = tune.tune("cpu")
    assert found.crossover == crossovers.Crossover(0, measured=True)
    assert crossovers.find("cuda-8.6").gemv_max_rows == 3


def test_the_reference_keeps_its_fast_dequantize():
    with dispatch.override("reference", only="lora_matmul"):
        assert dispatch.choose("lora_matmul", torch.zeros(1), rows=1) == "reference"
        assert dispatch.choose("nf4_dequantize", torch.zeros(1)) == "cpu"


def test_random_weights_have_a_weight_s_layout():
    weight = tune.random_nf4((33, 66), torch.bfloat16, torch.device("cpu"))
    assert weight.dequantize().shape == (33, 66)
    assert 0.001 < weight.dequantize().float().std() < 1


def test_without_c_kernels_there_is_nothing_to_tune(monkeypatch, capsys):
    monkeypatch.setattr(native, "library", lambda: None)
    assert main(["tune", "--device", "cpu"]) == 2
    assert "see jindo-core doctor" in capsys.readouterr().err


def test_a_broken_table_is_one_line_and_2(own_cache, capsys):
    (own_cache / "crossovers.json").write_text("[]")
    assert main(["tune", "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert str(own_cache / "crossovers.json") in err


def test_a_folder_that_can_t_be_written_is_one_line_and_2(seconds, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JINDO_CACHE", str(tmp_path / "file" / "cache"))
    seconds(lambda name, rows: 1.0)
    assert main(["tune", "--device", "cpu"]) == 2
    assert "set JINDO_CACHE to a folder" in capsys.readouterr().err


def test_a_wrong_device_is_2(capsys):
    assert main(["tune", "--device", "tpu"]) == 2
    assert "expected auto, cpu, cuda or cuda:N" in capsys.readouterr().err


def test_the_table_lies_where_the_embedded_model_does(monkeypatch, own_cache):
    assert crossovers.user_file().parent == embedded.cache_dir() == own_cache
    monkeypatch.delenv("JINDO_CACHE")
    assert crossovers.user_file().parent == embedded.cache_dir()
