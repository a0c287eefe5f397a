"""`jindo-core doctor`: what it says, and when it says no."""

from __future__ import annotations

import importlib
import json

import pytest

from jindo_core import doctor
from jindo_core.cli.main import main
from jindo_core.kernels import crossovers, dispatch, native


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JINDO_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "160")
    crossovers.forget()
    yield tmp_path
    crossovers.forget()


def findings(capsys):
    code = main(["doctor", "--json"])
    out, err = capsys.readouterr()
    assert err == ""
    return code, json.loads(out)


def test_a_machine_that_runs_these_tests_can_train(capsys, own_cache):
    code, found = findings(capsys)
    assert (code, found["problems"], found["can_train"]) == (0, [], True)
    assert set(found["operators"]) == set(dispatch.IMPLEMENTATIONS)
    assert found["packages"]["torch"]
    assert found["cpu"]["cores"] >= 1
    assert found["cache"] == {"folder": str(own_cache), "embedded_model": False, "writable": True}
    assert found["crossovers"]["file"] == str(crossovers.SHIPPED)


def test_the_table_names_what_matters(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for said in ("Python", "torch", "CPU", "C kernels", "GPU", "nf4_dequantize:", "crossovers", "cache", "peers"):
        assert said in out
    assert "this machine can train" in out


def test_the_instruction_level_in_use_is_named(capsys):
    _, found = findings(capsys)
    if native.library() is not None:
        assert found["c_kernels"]["level"] in native.LEVELS


def test_c_kernels_that_were_not_built_are_a_note_with_the_way_to_get_them(monkeypatch, capsys):
    monkeypatch.setattr(native, "library", lambda: None)
    code, found = findings(capsys)
    assert code == 0
    assert "install a C compiler" in found["c_kernels"]["fix"]
    assert set(found["operators"].values()) == {"reference"}
    assert main(["doctor"]) == 0
    assert "not built" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["torch", "gguf"])
def test_a_package_that_is_missing_is_a_problem_and_1(name, monkeypatch, capsys):
    real = importlib.import_module

    def missing(wanted, *rest):
        if wanted == name:
            raise ImportError(f"No module named {name!r}")
        return real(wanted, *rest)

    monkeypatch.setattr(doctor.importlib, "import_module", missing)
    code, found = findings(capsys)
    assert code == 1
    assert found["problems"] == [f"{name} can't be imported (No module named {name!r}): pip install {name}"]
    assert main(["doctor"]) == 1
    assert "this machine can't train yet" in capsys.readouterr().out


def test_an_operator_that_fails_is_a_problem(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(dispatch, "implementation", lambda *_, **__: broken)
    code, found = findings(capsys)
    assert code == 1
    assert found["problems"][0].endswith("no kernel image is available")


def test_a_broken_crossover_file_is_a_problem_that_names_it(capsys, own_cache):
    (own_cache / "crossovers.json").write_text("{")
    crossovers.forget()
    code, found = findings(capsys)
    assert code == 1
    assert str(own_cache / "crossovers.json") in found["problems"][0]


def test_a_cache_that_can_t_be_made_is_a_note(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JINDO_CACHE", str(tmp_path / "file" / "cache"))
    crossovers.forget()
    code, found = findings(capsys)
    assert code == 0
    assert "set JINDO_CACHE" in found["notes"][0]


def test_unknown_flags_are_2(capsys):
    assert main(["doctor", "--jsn"]) == 2
    assert "Did you mean '--json'?" in capsys.readouterr().err
