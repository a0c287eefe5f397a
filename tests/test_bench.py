"""The machinery of bench/: pairs, agreement, refusal, the table and the plots."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

CPU = torch.device("cpu")


@pytest.fixture
def bench(repo_root, monkeypatch):
    """bench("timing"): a module of bench/."""
    monkeypatch.syspath_prepend(str(repo_root))
    return lambda name: importlib.import_module(f"bench.{name}")


@pytest.fixture
def case(bench):
    def make(calls, **more):
        given = {"operator": "nf4", "name": "dequantize", "shape": "1x1", "work": 1e6, "unit": "GB/s", "limit": "copy"}
        return bench("timing").Case(**given | more, calls=calls)

    return make


@pytest.fixture
def ceilings(bench):
    return bench("ceilings").Ceilings(CPU, torch.float32, quick=True)


def ones(_):
    return torch.ones(2)


def test_a_row_says_rate_share_and_ratios(bench, case, ceilings):
    row = bench("timing").measure(case({"jindo": ones, "peer": ones}, tolerance=0.0, tokens=4), CPU, ceilings, 0.0)
    assert row["rate"] == pytest.approx(1e6 / row["median_s"] / 1e9)
    assert row["share"] == pytest.approx(row["rate"] / ceilings.of("copy"))
    assert row["ratios"]["peer"] == pytest.approx(row["peers"]["peer"] / row["median_s"])
    assert row["tokens_per_s"]["jindo"] == pytest.approx(4 / row["median_s"])
    assert row["rounds"] == 3


def test_ours_and_the_peers_take_turns_on_the_same_data(bench, case):
    order = []
    calls = {name: lambda turn, name=name: order.append((name, turn)) or torch.ones(1) for name in ("jindo", "a", "b")}
    pair = bench("timing").Pair(case(calls), CPU, 0.0)
    order.clear()
    for _ in range(2):
        pair.peers()
        pair.ours()
    assert order == [(name, turn) for turn in range(2) for name in ("a", "b", "jindo")]


def test_a_peer_that_fails_is_left_out_and_named(bench, case, ceilings):
    def broken(_):
        raise ValueError("no such\ndevice")

    row = bench("timing").measure(case({"jindo": ones, "peer": broken}), CPU, ceilings, 0.0)
    assert row["ratios"] == {}
    assert row["failed_peers"] == {"peer": "ValueError: no such device"}
    with pytest.raises(ValueError, match="no such"):
        bench("timing").measure(case({"jindo": broken}), CPU, ceilings, 0.0)


@pytest.mark.parametrize("other", [lambda _: torch.tensor([1.0, 1.2]), lambda _: torch.tensor([1.0, torch.nan])])
def test_a_peer_that_does_other_work_is_not_compared(bench, case, other):
    with pytest.raises(AssertionError, match="peer differs from ours"):
        bench("timing").Pair(case({"jindo": ones, "peer": other}, tolerance=0.1), CPU)
    bench("timing").Pair(case({"jindo": ones, "peer": other}, tolerance=0.1, unlike=frozenset({"peer"})), CPU)


def test_an_operator_without_passing_tests_is_refused(bench, tmp_path, monkeypatch):
    conftest = bench("conftest")
    monkeypatch.setattr(conftest, "ROOT", tmp_path)
    (tmp_path / "tests" / "kernels").mkdir(parents=True)
    for name, verdict in (("good", True), ("bad", False)):
        (tmp_path / "tests" / "kernels" / f"test_{name}.py").write_text(f"def test_it():\n    assert {verdict}\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow: x\n")
    assert conftest.fault("good") is None
    assert "assert False" in conftest.fault("bad")
    assert conftest.fault("missing") == "tests/kernels/test_missing.py is not there"
    conftest.fault.cache_clear()


def test_shapes_are_named(bench):
    shapes = bench("shapes")
    assert [s.name for s in shapes.named("small,7b,1b", shapes.OPERATOR_SETS)] == ["110m", "1b", "7b"]
    with pytest.raises(ValueError, match="got '6b', expected small, all, tiny"):
        shapes.named("6b", shapes.OPERATOR_SETS)
    assert shapes.SHAPES["7b"].linear_weights == 6_476_005_376
    assert shapes.SHAPES["8b"].linear_weights == 6_979_321_856


def test_the_table_and_the_plots(bench, case, ceilings, tmp_path, capsys):
    report, plot = bench("report"), bench("plot")
    row = bench("timing").measure(case({"jindo": ones, "peer": ones}, tokens=4), CPU, ceilings, 0.0)
    row["peak_mib"] = {"jindo": 1234}
    text = report.show([row], ceilings.again(), "machine")
    for said in ("dequantize", "GB/s", "(copy)", "peer", "1,234 MiB", "ceilings, first and again"):
        assert said in text
    report.settle([row], {"copy": {"first": row["rate"], "again": row["rate"] * 2}})
    assert row["share"] == 0.5
    older = tmp_path / "zzz-2025-01-01-000000.json"
    older.write_text("{}")
    (tmp_path / "gates.json").write_text("{}")
    path = report.write(tmp_path, report.facts(CPU) | {"ceilings": {}, "rows": [row]})
    assert json.loads(path.read_text())["measured"] is True
    assert report.newest(tmp_path) == path
    assert plot.main([str(path)], tmp_path) == 0
    assert {"roofline-cpu.png", "ratios-cpu.png"} <= {p.name for p in tmp_path.iterdir()}
    assert plot.main([str(tmp_path / "none.json")], tmp_path) == 2
    assert "expected a .json of `make bench`" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["peft loop", "patched loop", "Trainer", "TRL SFT", "Lightning"])
def test_trainers_beside_bitsandbytes(bench, what):
    """Both sides train the same thing: the pair is refused otherwise."""
    case = bench("integrations").case(what, bench("shapes").SHAPES["tiny"], torch.float32, CPU, 32)
    assert list(case.calls) == ["jindo", "bitsandbytes"]
    assert bench("timing").Pair(case, CPU, 0.0).failed == {}


def test_each_trainer_is_held_to_bitsandbytes(bench):
    """The names above, which pytest needs before bench/ can be imported."""
    listed = next(m.args[1] for m in test_trainers_beside_bitsandbytes.pytestmark if m.name == "parametrize")
    assert listed == list(bench("integrations").TRAINERS)


@pytest.mark.slow
def test_fsdp2_beside_bitsandbytes(bench):
    case = bench("fsdp").case(bench("shapes").SHAPES["tiny"], torch.float32, 32)
    assert list(case.calls) == ["jindo", "bitsandbytes"]
    assert bench("timing").Pair(case, CPU, 0.0).failed == {}
