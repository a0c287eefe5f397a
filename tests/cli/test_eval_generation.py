"""`jindo-core eval --tasks generation`: a data file's rows answered, stopped and taken up, in NF4 and not."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from jindo_core import predictions
from jindo_core.adapters import save_adapter
from jindo_core.cli.main import main
from jindo_core.config import resolve_train_config
from jindo_core.data.templates import load_template
from jindo_core.eval_config import EvalConfig, task_paths
from jindo_core.loader import load_model
from jindo_core.lora import adapted_layers, attach_lora
from jindo_core.outcome import record_of
from jindo_core.run_record import write_run

ROWS = [{"instruction": f"Tell me about {name}.", "output": f"Here is {name}."} for name in ("a cat", "Tom", "the sun")]
ROWS += [{"instruction": "Go on", "input": "Once upon a time", "output": ", there was a dog."}]
ROWS += [{"instruction": "Hm?", "output": ""}]


@pytest.fixture
def command(stories260k, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    return [
        "eval", "--base_model", str(stories260k), "--device", "cpu", "--dtype", "fp32", "--batch_size", "2",
        "--tasks", "generation", "--data_path", str(tmp_path / "rows.json"), "--prompt_template_name", "alpaca_short",
        "--max_new_tokens", "10", "--quantize", "both",
    ]  # fmt: skip


def saved(folder, name="results"):
    return ["--output_path", str(folder / f"{name}.json"), "--predictions_path", str(folder / f"{name}.jsonl")]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_figures_table_and_lines_agree(command, tmp_path, capsys):
    assert main([*command, *saved(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("exact_match", "chrf", "ended", "mean_tokens", "answers changed"))
    report = json.loads((tmp_path / "results.json").read_text())
    assert str(tmp_path) not in json.dumps(report)
    assert report["settings"]["prompt_template"] == "alpaca_short"
    assert (report["settings"]["max_new_tokens"], report["settings"]["temperature"]) == (10, 0.0)
    told = {kept: [one for one in lines(tmp_path / "results.jsonl") if one["quantize"] == kept] for kept in NAMES}
    for kept, own in told.items():
        assert [one["row"] for one in own] == [1, 2, 3, 4, 5]
        assert [one["instruction"] for one in own] == [row["instruction"] for row in ROWS]
        assert [one["reference"] for one in own] == [row["output"] or None for row in ROWS]
        figures = report["results"][kept]["generation"]
        assert figures["mean_tokens"] == sum(one["tokens"] for one in own) / 5
        assert (figures["n"], figures["n_chrf"], own[4]["exact"]) == (5, 4, None)
    changed = sum(a["prediction"] != b["prediction"] for a, b in zip(*told.values(), strict=True))
    assert report["drift"]["generation"]["answers_changed"] == changed > 0
    assert main([*command, "--limit", "2", *saved(tmp_path, "two")]) == 0
    assert [one["row"] for one in lines(tmp_path / "two.jsonl")] == [1, 2, 1, 2]


NAMES = ("nf4", "none")


def test_answers_are_those_of_generate(command, tmp_path, capsys):
    assert main([*command, *saved(tmp_path)]) == 0
    capsys.readouterr()
    for one in lines(tmp_path / "results.jsonl")[1:9:2]:
        asked = ["--instruction", one["instruction"], *(["--input", one["input"]] if one["input"] else [])]
        argv = ["generate", *command[1:7], "--quantize", one["quantize"], *asked, "--max_new_tokens", "10"]
        assert main([*argv, "--prompt_template_name", "alpaca_short"]) == 0
        assert capsys.readouterr().out == one["prediction"] + "\n"


@pytest.mark.parametrize("more", [[], ["--temperature", "0.9", "--top_p", "0.9", "--top_k", "30", "--seed", "5"]])
def test_stopped_and_taken_up_it_ends_with_the_same_bytes(command, more, tmp_path, monkeypatch, capsys):
    answer, calls = predictions.answer, []
    assert main([*command, *more, *saved(tmp_path, "whole")]) == 0

    def stopping(*given):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return answer(*given)

    monkeypatch.setattr(predictions, "answer", stopping)
    assert main([*command, *more, *saved(tmp_path)]) == 130
    assert not (tmp_path / "results.jsonl").exists()
    capsys.readouterr()
    assert main([*command, *more, *saved(tmp_path)]) == 0
    assert "going on: 4 batches were done before" in capsys.readouterr().out
    assert len(calls) == 5 + 2
    for ending in ("json", "jsonl"):
        assert (tmp_path / f"results.{ending}").read_bytes() == (tmp_path / f"whole.{ending}").read_bytes()


def test_another_sampling_or_row_is_another_run(command, tmp_path, monkeypatch, capsys):
    answer, calls = predictions.answer, []

    def stopping(*given):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return answer(*given)

    monkeypatch.setattr(predictions, "answer", stopping)
    assert main([*command, *saved(tmp_path)]) == 130
    for more, name in ((["--temperature", "0.5"], "temperature"), (["--max_new_tokens", "9"], "max_new_tokens")):
        capsys.readouterr()
        assert main([*command, *more, *saved(tmp_path)]) == 2
        assert f"is of a run with another {name}: take its settings" in capsys.readouterr().err
    (tmp_path / "rows.json").write_text(json.dumps([*ROWS[:4], {"instruction": "Hm?", "output": "Yes."}]))
    assert main([*command, *saved(tmp_path)]) == 2
    assert "is of a run with another data" in capsys.readouterr().err


def test_batches_are_halved_where_memory_runs_out(command, tmp_path, monkeypatch):
    answer, sizes = predictions.answer, []

    def tight(*given):
        sizes.append(len(given[-1]))
        if len(given[-1]) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return answer(*given)

    assert main([*command, *saved(tmp_path, "whole")]) == 0
    monkeypatch.setattr(predictions, "answer", tight)
    assert main([*command, *saved(tmp_path)]) == 0
    assert sizes == [2, 1, 1, 2, 1, 1, 1] * 2
    assert (tmp_path / "results.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_an_adapter_brings_its_base_and_its_template(stories260k, command, tmp_path):
    model = attach_lora(load_model(stories260k, dtype="fp32", device="cpu"), r=2, alpha=4)
    for _, layer in adapted_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    adapter = save_adapter(model, tmp_path / "adapter", base_model=str(stories260k))
    config, _, _ = resolve_train_config({"base_model": str(stories260k), "prompt_template_name": "korean_short"})
    write_run(adapter, record_of(config, {}))
    at = command.index("--prompt_template_name")
    bare = [*command[:1], *command[3:at], *command[at + 2 :]]
    assert main([*bare, "--lora_weights", str(adapter), *saved(tmp_path)]) == 0
    assert main([*command, "--prompt_template_name", "korean_short", *saved(tmp_path, "base")]) == 0
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["settings"]["prompt_template"] == load_template("korean_short").name
    assert report["settings"]["data"] == json.loads((tmp_path / "base.json").read_text())["settings"]["data"]
    own, base = ([one["prediction"] for one in lines(tmp_path / name)] for name in ("results.jsonl", "base.jsonl"))
    assert own != base


def test_other_formats_and_rows_that_bring_their_prompt(command, tmp_path):
    """A conversation file by its columns; qlora's input and output, round which no template goes."""
    talk = [{"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]}]
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, talk)))
    at = tmp_path / "own.jsonl"
    (tmp_path / "plain.json").write_text(json.dumps([{"input": "Once upon", "output": " a time"}]))
    for name, template, reference in (("talk.jsonl", "alpaca_short", "Hello."), ("plain.json", "none", " a time")):
        form = ["--dataset_format", "input-output"] if name == "plain.json" else []
        shutil.copy(tmp_path / name, at)
        argv = [*command[: command.index("--data_path") + 1], str(at), *command[command.index("--data_path") + 2 :]]
        argv += [*form, *saved(tmp_path, name)]
        assert main(argv) == 0
        assert json.loads((tmp_path / f"{name}.json").read_text())["settings"]["prompt_template"] == template
        assert lines(tmp_path / f"{name}.jsonl")[0]["reference"] == reference


def test_long_prompts_are_told(stories260k, command, tmp_path, capsys):
    rows = [ROWS[0], {"instruction": "a dog and " * 400, "output": "x"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert main([*command, *saved(tmp_path)]) == 0
    assert "note: generation: 1 rows leave no room for an answer, and count as wrong" in capsys.readouterr().out
    assert [one["ended"] for one in lines(tmp_path / "results.jsonl")][1::2] == ["no room", "no room"]


def test_a_model_that_says_nothing_finite_stops_the_run(command, tmp_path, monkeypatch, capsys):
    from jindo_core import evaluation

    def broken(*given, **more):
        model = load_model(*given, **more)
        model.stack.norm.weight.data.fill_(float("nan"))
        return model

    monkeypatch.setattr(evaluation, "load_model", broken)
    assert main([*command, *saved(tmp_path)]) == 1
    assert "generation: the model's log-probabilities are not finite" in capsys.readouterr().err


def test_several_processes_are_refused(command, monkeypatch, capsys):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command) == 2
    assert "jindo-core eval: got 2 processes, expected one: start it without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tasks", "given", "expected"),
    [
        ("generation", ["x.txt"], {"generation": "x.txt"}),
        ("generation,perplexity", ["x.jsonl", "book.txt"], {"generation": "x.jsonl", "perplexity": "book.txt"}),
        ("generation,mmlu", ["q.json", "generation=x.json"], {"mmlu": "q.json", "generation": "x.json"}),
        ("generation,kobest_wic", ["x.csv", "w.tsv"], {"generation": "x.csv", "kobest_wic": "w.tsv"}),
    ],
)
def test_which_path_is_whose(tasks, given, expected):
    assert task_paths(EvalConfig(tasks=tuple(tasks.split(",")), data_path=tuple(given))) == expected
