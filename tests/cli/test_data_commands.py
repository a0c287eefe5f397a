"""`jindo-core data inspect`, `convert`, `preview` and `refine`: a run of each, and one line for what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from jindo_core.cli.main import main

ROWS = [
    {"instruction": "수도가 어디인가요?", "input": "", "output": "서울입니다."},
    {"instruction": "Tell a story.", "input": "", "output": "A dog ran to the park."},
]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return path


def fails(capsys, argv, message):
    assert main(["data", *argv]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert message in said.err


def test_inspect(data, stories260k, tmp_path, capsys):
    flags = ["--data_path", str(data), "--tokenizer", str(stories260k), "--output_dir", str(tmp_path / "r")]
    assert main(["data", "inspect", *flags]) == 0
    said = capsys.readouterr().out
    for part in ("rows.jsonl: 2 rows", "format: alpaca, by its columns", "tokens/character", "of output: ko 50.0%"):
        assert part in said
    assert "\x1b" not in said
    assert "█" in said
    assert (tmp_path / "r" / "lengths.png").read_bytes()[:4] == b"\x89PNG"
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert main(["data", "inspect", *flags, "--json", "--overwrite"]) == 0
    assert json.loads(capsys.readouterr().out) == report
    assert report["rows"] == 2
    assert {path.name for path in (tmp_path / "r").iterdir()} == {"lengths.png", "report.json"}


def test_inspect_of_the_embedded_korean_rows_needs_no_model(capsys):
    from jindo_core.data.records import bundled_path

    assert main(["data", "inspect", "--data_path", str(bundled_path()), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rows"] >= 300
    assert told["sample"]["tokens"] == []


def test_convert_and_a_config_file(data, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(f"data_path: {data}\nto: messages\noutput_path: {tmp_path / 'o.jsonl'}\n")
    assert main(["data", "convert", "--config", str(tmp_path / "c.yaml")]) == 0
    assert "2 rows of alpaca in, 2 of messages out" in capsys.readouterr().out
    first = json.loads((tmp_path / "o.jsonl").read_text().splitlines()[0])
    assert first["messages"][1] == {"role": "assistant", "content": "서울입니다."}


def test_preview_shows_the_mask(data, stories260k, capsys):
    flags = ["--data_path", str(data), "--base_model", str(stories260k), "--rows", "1", "--no_train_on_inputs"]
    assert main(["data", "preview", *flags]) == 0
    said = capsys.readouterr().out
    assert "row 1:" in said
    assert "⟦서울입니다.</s>⟧" in said
    assert "Tell a story" not in said
    assert main(["data", "preview", *flags, "--cutoff_len", "8"]) == 0
    assert "left out: nothing to learn" in capsys.readouterr().out


def test_refine_scores(data, stories260k, tmp_path, capsys):
    flags = ["--data_path", str(data), "--base_model", str(stories260k), "--output_path", str(tmp_path / "o.csv")]
    assert main(["data", "refine", "--mode", "score", *flags, "--device", "cpu"]) == 0
    assert "2 rows in, 2 out: 2 scored" in capsys.readouterr().out
    header = (tmp_path / "o.csv").read_text().splitlines()[0]
    assert header.endswith("output,score_tokens,score_loss,score_perplexity,score_ifd")
    fails(capsys, ["refine", "--mode", "score", *flags], "is there already: give another name, or --overwrite")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspect"], "--data_path: got nothing, expected file, folder or Hub id"),
        (["inspect", "--data_path", "nowhere.json"], "nowhere.json"),
        (["inspect", "--data_path", "rows.jsonl", "--tokeniser", "x"], "Did you mean '--tokenizer'?"),
        (["inspect", "--data_path", "rows.jsonl", "--tokenizer", "x", "--base_model", "y"], "expected one"),
        (["inspect", "--data_path", "rows.jsonl", "--tokenizer", "x"], "tokenizer path x does not exist"),
        (["inspect", "--data_path", "rows.jsonl", "--dataset_format", "orca"], "lacks 'question'"),
        (["inspect", "--data_path", "rows.jsonl", "--output_dir", "rows.jsonl"], "can't be made"),
        (["convert", "--data_path", "rows.jsonl", "--output_path", "o.json"], "--to: got nothing, expected format"),
        (["convert", "--data_path", "rows.jsonl", "--to", "qa"], "--output_path: got nothing"),
        (["convert", "--data_path", "rows.jsonl", "--to", "qa", "--output_path", "o.json", "--rounds=x"], "--rounds"),
        (["preview", "--data_path", "rows.jsonl", "--rows", "0"], "--rows: got '0'"),
        (["preview", "--data_path", "rows.jsonl", "--base_model", "nowhere"], "base model nowhere does not exist"),
        (["refine", "--data_path", "rows.jsonl", "--output_path", "o.json"], "--mode: got nothing, expected rewrite"),
        (["refine", "--mode", "rewrite", "--data_path", "rows.jsonl", "--output_path", "o.json"], "--instruction: got"),
        (
            ["refine", "--mode", "score", "--data_path", "rows.jsonl", "--output_path", "o.json", "--device", "tpu"],
            "--device: got 'tpu'",
        ),
        (
            ["refine", "--mode=score", "--data_path", "rows.jsonl", "--output_path", "o.json", "--min_length_ratio=3"],
            "--min_length_ratio: got 3, expected at most --max_length_ratio 2",
        ),
    ],
)
def test_wrong_input_is_one_line(capsys, data, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    fails(capsys, argv, message)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("command", ["inspect", "convert", "preview", "refine"])
def test_help_needs_no_torch(command):
    code = (
        "import sys; from jindo_core.cli.main import main; code = main(['data', sys.argv[1], '--help']); "
        "print(code, [m for m in ('torch', 'numpy', 'pyarrow', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("0 []\n")
    for flag in ("--data_path", "--dataset_format", "examples:"):
        assert flag in done.stdout
