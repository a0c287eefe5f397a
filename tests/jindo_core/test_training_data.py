"""From files to what a run learns: the split, several files, packs, the cache, and what a person is told."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from jindo_core import prepare
from jindo_core import train as training
from jindo_core.cli.main import main
from jindo_core.config import resolve_train_config
from jindo_core.data.examples import Encoder, encode_all
from jindo_core.data.packing import Pack, PackedRows
from jindo_core.data.readers import open_rows
from jindo_core.data.records import read_records, split_records
from jindo_core.data.store import tokenize
from jindo_core.data.templates import load_template
from jindo_core.errors import InputError
from jindo_core.tokenizer import load_tokenizer
from jindo_core.training_data import open_files, read_data
from jindo_core.training_view import TrainingView


def write(path, count, say="It is a little bird named Lily.", start=0):
    rows = [
        {"instruction": f"Name {i}." * (1 + i % 4), "output": say + " So." * (i % 5)}
        for i in range(start, start + count)
    ]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JINDO_TOKENIZED", str(tmp_path / "cache"))


def config_of(model, *paths, **changes):
    given = {
        "base_model": str(model), "data_path": [str(path) for path in paths], "batch_size": 8, "micro_batch_size": 4,
        "num_epochs": 1, "learning_rate": 1e-2, "cutoff_len": 256, "val_set_size": 8, "train_on_inputs": False,
        "prompt_template_name": "alpaca_short", "device": "cpu", "dtype": "fp32", "lora_dropout": 0.0,
    }  # fmt: skip
    return resolve_train_config(given | changes)


def read(model, *paths, **changes):
    config = config_of(model, *paths, **changes)[0]
    tokenizer = load_tokenizer(model)
    encoder = Encoder(
        tokenizer, load_template(config.prompt_template_name, tokenizer), cutoff_len=config.cutoff_len,
        train_on_inputs=config.train_on_inputs,
    )  # fmt: skip
    return read_data(open_files(config), config, encoder, config.cutoff_len, TrainingView())


def test_the_same_rows_are_held_out_as_when_rows_were_split(stories260k, tmp_path):
    path = write(tmp_path / "rows.json", 60)
    data = read(stories260k, path)
    tokenizer = load_tokenizer(stories260k)
    template = load_template("alpaca_short", tokenizer)
    training_records, held_out, _ = split_records(read_records(path), 8, 42)
    for part, records in ((data.examples, training_records), (data.held_out, held_out)):
        expected, _ = encode_all(records, tokenizer, template, cutoff_len=256, train_on_inputs=False)
        assert list(part) == expected
    assert data.probes == held_out
    assert read(stories260k, path, val_set_size=0).probes == split_records(read_records(path), 0, 42)[0]


def test_the_first_rows_after_the_split(stories260k, tmp_path):
    path = write(tmp_path / "rows.json", 60)
    whole, part = read(stories260k, path), read(stories260k, path, max_train_samples=5, max_eval_samples=3)
    assert list(part.examples) == whole.examples[:5]
    assert list(part.held_out) == whole.held_out[:3]
    assert (part.rows, part.asked) == (5, 3)


def test_files_with_weights(stories260k, tmp_path):
    few, many = write(tmp_path / "few.json", 20), write(tmp_path / "many.json", 40, "No.", start=100)
    data = read(stories260k, few, many, data_weights=[2, 0.5])
    middle = data.portions[1].start
    assert [(part.start, part.end) for part in data.portions] == [(0, middle), (middle, 52)]
    assert [part.weight for part in data.portions] == [2.0, 0.5]
    packed = read(stories260k, few, many, data_weights=[2, 0.5], packing=True)
    (_, first_end), (start, end) = ((part.start, part.end) for part in packed.portions)
    assert first_end == start
    parts = packed.examples[:start], packed.examples[start:end]
    rows = [Counter(n for example in part for n in example.documents) for part in parts]
    alone = [Counter(data.examples.lengths[part.start : part.end].tolist()) for part in data.portions]
    assert rows == alone, "no pack holds rows of two files"
    together = read(stories260k, few, many, packing=True)
    assert len(together.portions) == 1
    assert together.rows == 52


def test_packs_hold_every_row_once(stories260k, tmp_path):
    path = write(tmp_path / "rows.json", 60)
    plain, packed = read(stories260k, path), read(stories260k, path, packing=True)
    assert isinstance(packed.examples, PackedRows)
    assert len(packed.examples) < len(plain.examples) == packed.rows == 52
    assert all(isinstance(example, Pack) and len(example.input_ids) <= 256 for example in packed.examples)
    found = sorted(
        tuple(example.input_ids[sum(example.documents[:i]) : sum(example.documents[: i + 1])])
        for example in packed.examples for i in range(len(example.documents))
    )  # fmt: skip
    assert found == sorted(tuple(example.input_ids) for example in plain.examples)


def test_a_packed_run_learns_as_the_unpacked_one(stories260k, tmp_path, capsys):
    """All rows in one step, packed or not: the same loss and gradient, so the same second step and adapter."""
    path, losses = write(tmp_path / "rows.json", 40), {}
    for name, more in {"rows": {}, "packs": {"packing": True}}.items():
        out = tmp_path / name
        given = {"batch_size": 64, "micro_batch_size": 16, "max_steps": 3, "output_dir": str(out)} | more
        result = training.train(*config_of(stories260k, path, **given))
        log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [*(row["loss"] for row in log if "loss" in row), result.loss_after]
    assert losses["packs"] == pytest.approx(losses["rows"], rel=1e-4)
    assert losses["rows"][0] > losses["rows"][-1] + 0.5
    assert "32 rows packed into" in capsys.readouterr().out


def test_the_plan_counts_packs(stories260k, tmp_path, monkeypatch):
    jobs = []
    original = prepare.plan
    monkeypatch.setattr(prepare, "plan", lambda job: jobs.append(job) or original(job))
    path = write(tmp_path / "rows.json", 60)
    for packing in (False, True):
        prepare.prepare(*config_of(stories260k, path, packing=packing)[:2], TrainingView())
    plain, packed = jobs[0], jobs[len(jobs) // 2]
    assert (plain.packed, packed.packed) == (False, True)
    assert plain.length < 100
    assert 200 < packed.length <= 256
    assert packed.micro_batch == 4


def test_a_longllama_is_not_packed(stories260k, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in stories260k.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "config.json").read_text())
    memory = {"model_type": "longllama", "mem_layers": [1], "last_context_length": 64}
    (folder / "config.json").write_text(json.dumps(settings | memory))
    config = config_of(folder, write(tmp_path / "rows.json", 20), packing=True, output_dir=str(tmp_path / "out"))
    with pytest.raises(InputError, match=r"--packing: got it with a LongLLaMA, .* leave --packing out"):
        training.train(*config)


def test_the_second_run_finds_its_rows_tokenized(stories260k, tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "rows.json", 60)
    read(stories260k, path)
    assert "rows.json: 60 rows (alpaca), tokenized, " in capsys.readouterr().out
    read(stories260k, path, packing=True, seed=3, batch_size=4)
    assert "60 rows (alpaca), tokenized by an earlier run" in capsys.readouterr().out
    read(stories260k, path, cutoff_len=64)
    assert "tokenized, " in capsys.readouterr().out
    places = []

    def watched(*args, cache, **more):
        places.append(cache)
        return tokenize(*args, cache=cache, **more)

    monkeypatch.setattr("jindo_core.training_data.tokenize", watched)
    read(stories260k, path, tokenized_cache=False)
    assert places == [None]


def test_left_out_rows_are_named_with_their_file(stories260k, tmp_path, capsys):
    one = write(tmp_path / "one.json", 10)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"instruction": "word " * n, "output": "x"}) + "\n" for n in (1, 400, 2, 400)))
    read(stories260k, one, other, val_set_size=0)
    said = capsys.readouterr().out
    assert "note: other.jsonl: 2 rows (2, 4) of 4 left out: the prompt alone fills cutoff_len 256; raise it" in said
    assert "one.json: " not in said.replace("one.json: 10 rows", "")


def test_lengths_apart_stay_within_the_context(stories260k, tmp_path, capsys):
    config, explicit, _ = config_of(
        stories260k, write(tmp_path / "rows.json", 20), source_max_len=1024, target_max_len=256, preview=1
    )
    prepare.preview(config, explicit, TrainingView())
    said = capsys.readouterr().out
    assert "source_max_len 1024 and target_max_len 256 are beyond the model's context of 512: 256 and 256" in said


def test_a_preview_of_several_files_names_each(stories260k, tmp_path, capsys):
    one, other = write(tmp_path / "one.json", 1), write(tmp_path / "other.json", 9)
    config, explicit, _ = config_of(stories260k, one, other, preview=3)
    prepare.preview(config, explicit, TrainingView())
    heads = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("── ")]
    assert heads == ["── one.json, row 1", "── other.json, row 1", "── other.json, row 2"]


def test_a_preview_loads_no_model_and_writes_nothing(stories260k, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "load_model", lambda *a, **k: pytest.fail("loaded"))
    path, out = write(tmp_path / "rows.json", 20), tmp_path / "out"
    command = ["train", "--base_model", str(stories260k), "--data_path", str(path), "--output_dir", str(out)]
    assert main([*command, "--preview", "2", "--no_train_on_inputs"]) == 0
    said = capsys.readouterr().out
    assert "row 1: " in said
    assert "row 2: " in said
    assert "row 3: " not in said
    assert "⟦" in said
    assert not out.exists()
    with pytest.raises(InputError, match="preview is 2, expected 0 to train"):
        training.train(*config_of(stories260k, path, preview=2))


def test_qloras_names_stand_for_data_sets_where_there_is_no_such_file(tmp_path, monkeypatch):
    asked = []

    def fetch(name):
        asked.append(name)
        path = tmp_path / "fetched.jsonl"
        path.write_text(json.dumps({"text": "### Human: Hi.### Assistant: Hello."}) + "\n")
        return open_rows(path)

    monkeypatch.setattr("jindo_core.training_data.open_rows", fetch)
    monkeypatch.chdir(tmp_path)
    (file,) = open_files(config_of("m", "oasst1")[0])
    assert (asked, file.format.name) == (["timdettmers/openassistant-guanaco"], "oasst1")
    write(tmp_path / "oasst1", 2)  # a file of one's own wins
    (file,) = open_files(config_of("m", "oasst1", dataset_format="text")[0])
    assert (asked[-1], file.format.name) == ("oasst1", "text")
