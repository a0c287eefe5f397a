"""`jindo-core data`, `data clean` and `data split`: help, one line for what is wrong, a run of each."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from jindo_core.cli.data import COMMANDS, HELP
from jindo_core.cli.main import main

ROWS = [
    {"id": "a", "instruction": "요약하세요", "input": "", "output": "하나\r\n둘 ", "text": "Q: 요약하세요\nA: 하나 둘"},
    {"id": "b", "instruction": "번역하세요", "input": "", "output": " ", "text": "Q: 번역하세요\nA:"},
    {"id": "c", "instruction": "쓰세요", "input": "", "output": "<p>셋</p>", "text": "Q: 쓰세요\nA: <p>셋</p>"},
]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "raw.json"
    path.write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8")
    return str(path)


def fails(capsys, argv, message):
    assert main(["data", *argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert message in said


def test_help_is_short_and_names_every_command(capsys):
    assert main(["data"]) == 0
    assert capsys.readouterr().out == HELP
    assert len(HELP.splitlines()) <= 18
    assert all(f"\n  {name} " in HELP for name in COMMANDS)
    assert main(["data", "help", "clean"]) == 0
    said = capsys.readouterr().out
    assert "--list_steps" in said
    assert "--rejected_path" in said


def test_help_waits_for_no_library():
    code = (
        "import sys; from jindo_core.cli.main import main; main(['data', 'clean', '--help']); "
        "print([m for m in ('torch', 'numpy', 'ftfy', 'pyarrow', 'rich', 'datasketch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_clean(source, tmp_path, capsys):
    files = {name: tmp_path / f"{name}.jsonl" for name in ("output", "rejected", "flagged")}
    argv = ["clean", "--data_path", source, *(w for n, p in files.items() for w in (f"--{n}_path", str(p)))]
    assert main(["data", *argv, "--report-path", str(tmp_path / "report.json")]) == 0
    said = capsys.readouterr()
    assert "3 rows in + 0 made = 2 out + 1 rejected; written to" in said.out
    assert "html, rows: N HTML tags: 1" in said.out
    assert "\x1b" not in said.out + said.err  # no bar, no colours without a terminal
    rows = {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in files.items()}
    assert rows["output"] == [
        {"id": "a", "instruction": "요약하세요", "input": "", "output": "하나\n둘"},
        {"id": "c", "instruction": "쓰세요", "input": "", "output": "<p>셋</p>"},
    ]
    assert [(row["row"], row["step"], row["reason"]) for row in rows["rejected"]] == [(2, "empty_answers", "no answer")]
    assert [(row["row"], row["step"]) for row in rows["flagged"]] == [(3, "html")]
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["in"], report["out"], report["rejected"], report["format"]) == (3, 2, 1, "alpaca")
    assert next(step for step in report["steps"] if step["step"] == "rendered_text")["changed"] == 3
    fails(capsys, argv, "is there already: give another name, or --overwrite")


def test_a_dry_run_as_json(source, tmp_path, capsys):
    assert main(["data", "clean", "--data_path", source, "--recipe", "korean", "--dry_run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["dry_run"], report["in"]) == (True, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["raw.json"]


def test_a_terminal_gets_bars_beside_the_json(source, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["data", "clean", "--data_path", source, "--dry_run", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["in"] == 3
    assert "reading" in said.err
    assert "exact_duplicates" in said.err


def test_list_steps(capsys):
    assert main(["data", "clean", "--list_steps"]) == 0
    said = capsys.readouterr().out
    assert "\nnfc: Composes letters" in said
    assert "\n    tags: tags of running text such as <p>, <br> and <span> (keep | flag | strip) [flag]" in said


def test_split(source, tmp_path, capsys):
    assert main(["data", "split", "--data_path", source, "--output_dir", str(tmp_path / "s"), "--test_size=1"]) == 0
    assert "3 rows in = 2 in train.json + 1 in test.json (seed 42)" in capsys.readouterr().out
    rows = [json.loads((tmp_path / "s" / f"{name}.json").read_text()) for name in ("train", "test")]
    assert sorted(rows[0] + rows[1], key=lambda row: row["id"]) == ROWS
    argv = ["data", "split", "--data_path", source, "--output_dir", str(tmp_path / "s"), "--overwrite", "--json"]
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["test_rows"] == 1


def test_what_is_wrong_is_one_line(source, tmp_path, capsys):
    fails(capsys, ["claen"], "got 'claen' after data, expected a command")
    fails(capsys, ["--data_path", source], "got the flag '--data_path' after data, expected a command")
    fails(capsys, ["clean"], "--data_path: got nothing, expected file")
    fails(capsys, ["clean", "--data_path", source], "--output_path: got nothing, expected file to write")
    fails(capsys, ["clean", "--data_path", source, "--recipes", "x"], "Did you mean '--recipe'?")
    fails(capsys, ["clean", "--data_path", source, "--dry_run", "--recipe", "korea"], "Did you mean 'korean'?")
    fails(capsys, ["clean", "--data_path", str(tmp_path / "no.json"), "--dry_run"], "no.json")
    fails(capsys, ["clean", "--data_path", source, "--output_path", str(tmp_path / "o.xyz")], "its ending is not known")
    fails(capsys, ["split", "--data_path", source], "--output_dir: got nothing, expected folder for train and test")
    (tmp_path / "empty.jsonl").write_text(json.dumps({"instruction": "q", "output": ""}) + "\n")
    fails(
        capsys,
        ["clean", "--data_path", str(tmp_path / "empty.jsonl"), "--output_path", str(tmp_path / "o.jsonl")],
        "no row of 1 is left, so nothing was written: step empty_answers rejected 1 (no answer)",
    )
    assert not (tmp_path / "o.jsonl").exists()
