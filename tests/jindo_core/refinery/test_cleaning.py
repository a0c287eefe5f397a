"""The refinery's engine: no row is lost, whatever the steps do; the order, the files, and ends before the end."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_steps import TOYS

from jindo_core.data_config import CleanConfig
from jindo_core.errors import InputError, TrainingError
from jindo_core.refinery import cleaning
from jindo_core.refinery.recipe import STEPS


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    for name, step in TOYS.items():
        monkeypatch.setitem(STEPS, name, step)


def write_rows(path, outputs, **more):
    rows = [{"id": f"r{i}", "instruction": f"q{i}", "input": "", "output": o, **more} for i, o in enumerate(outputs)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return rows


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def recipe(path, *steps):
    path.write_text(yaml.safe_dump({"steps": list(steps)}), encoding="utf-8")
    return str(path)


def run(folder, *steps, **more):
    return cleaning.clean(
        CleanConfig(
            data_path=str(folder / "in.jsonl"), output_path=str(folder / "out.jsonl"), overwrite=True,
            rejected_path=str(folder / "rejected.jsonl"), flagged_path=str(folder / "flagged.jsonl"),
            recipe=recipe(folder / "recipe.yaml", *steps), **more,
        )
    )  # fmt: skip


ROW_STEPS = st.sampled_from(["drop", "triple", "flag", "unlike", {"drop": {"digit": 0}}, {"triple": {"digit": 7}}])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    outputs=st.lists(st.integers(0, 40).map(str), min_size=1, max_size=40),
    steps=st.lists(ROW_STEPS, max_size=6),
    raw=st.booleans(),
)
def test_no_row_is_lost(tmp_path, monkeypatch, outputs, steps, raw):
    """Random steps on random rows, in chunks of three: counted in the files, not by the engine."""
    monkeypatch.setattr(cleaning, "CHUNK_ROWS", 3)
    rows = write_rows(tmp_path / "in.jsonl", outputs)
    (tmp_path / "out.jsonl").unlink(missing_ok=True)
    recipe_steps = [*(["raw_double"] if raw else []), *steps, "drop"]
    if not run(tmp_path, *recipe_steps, dry_run=True).rows_out:
        with pytest.raises(InputError, match="is left, so nothing was written"):
            run(tmp_path, *recipe_steps)
        assert not (tmp_path / "out.jsonl").exists()
        return
    report = run(tmp_path, *recipe_steps)
    out, rejected = read_rows(tmp_path / "out.jsonl"), read_rows(tmp_path / "rejected.jsonl")
    assert report.rows_in == len(rows)
    assert (report.rows_out, report.rejected) == (len(out), len(rejected))
    assert len(rows) + report.made == len(out) + len(rejected)
    assert {row["id"] for row in out} | {row["values"]["id"] for row in rejected} == {row["id"] for row in rows}
    assert [int(row["id"][1:]) for row in out] == sorted(int(row["id"][1:]) for row in out)  # the source's order
    assert sum(step.flagged for step in report.steps) == len(read_rows(tmp_path / "flagged.jsonl"))
    for row in rejected:
        assert row["row"] == int(row["values"]["id"][1:]) + 1


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(*[st.text(st.characters(codec="utf-8"), max_size=60)] * 4), min_size=1, max_size=8))
@pytest.mark.parametrize("name", ["default", "korean"])
def test_the_packages_recipes_take_any_unicode(tmp_path, name, rows):
    values = [dict(zip(("instruction", "input", "output", "text"), row, strict=True)) for row in rows]
    values.append({"instruction": "쓰세요", "input": "", "output": "한국의 수도는 서울입니다.", "text": ""})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
    config = {"data_path": str(tmp_path / "in.jsonl"), "output_path": str(tmp_path / "out.json"), "recipe": name}
    report = cleaning.clean(CleanConfig(**config, rejected_path=str(tmp_path / "gone.json"), overwrite=True))
    out, gone = (json.loads((tmp_path / file).read_text()) for file in ("out.json", "gone.json"))
    assert (len(values), report.made) == (len(out) + len(gone), 0)
    assert values[-1]["output"] in [row["output"] for row in out]


def test_each_answer_of_a_step_by_hand(tmp_path):
    write_rows(tmp_path / "in.jsonl", ["1", "2", "3", "4", "4", "10", "10", "9", "8"])
    report = run(tmp_path, "raw_double", "drop", "triple", "flag", "unlike")
    # 9 becomes 91 and 92, 8 goes; 1 and 91 go; 2 and 92 become three each; 3 is flagged; 4 stood before, 10 may twice.
    assert [row["output"] for row in read_rows(tmp_path / "out.jsonl")] == [
        "20", "21", "22", "!3", "4", "10", "10", "920", "921", "922",
    ]  # fmt: skip
    rejected = read_rows(tmp_path / "rejected.jsonl")
    assert [(row["row"], row["step"], row["reason"], row["values"]["output"]) for row in rejected] == [
        (1, "drop", "ends in 1", "1"), (8, "drop", "ends in 1", "91"), (9, "raw_double", "an eight", "8"),
        (5, "unlike", "as row 4", "4"),
    ]  # fmt: skip
    assert read_rows(tmp_path / "flagged.jsonl")[0] == {
        "row": 3, "step": "flag", "reason": "a three",
        "values": {"id": "r2", "instruction": "q2", "input": "", "output": "3"},
    }  # fmt: skip
    by_name = {step.name: step for step in report.steps}
    assert [step.name for step in report.steps] == ["raw_double", "read", "drop", "triple", "flag", "unlike"]
    assert (by_name["raw_double"].rows_in, by_name["raw_double"].made, by_name["raw_double"].rejected) == (9, 1, 1)
    assert (by_name["triple"].changed, by_name["triple"].made) == (2, 4)
    assert (by_name["flag"].flagged, by_name["flag"].changed, dict(by_name["flag"].found)) == (1, 1, {"threes": 1})
    assert dict(by_name["unlike"].reasons) == {"as row N": 1}


def test_a_join_takes_its_rows_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(cleaning, "CHUNK_ROWS", 2)
    write_rows(tmp_path / "in.jsonl", ["1", "2", "5", "3", "15", "2", "3", "4", "3", "25"])
    report = run(tmp_path, "pair")
    out, rejected = read_rows(tmp_path / "out.jsonl"), read_rows(tmp_path / "rejected.jsonl")
    assert [(row["id"], row["output"]) for row in out] == [
        ("r0", "1"), ("r1", "q1+2+q5+2"), ("r2", "5"), ("r4", "15"), ("r7", "4"), ("r9", "25"),
    ]  # fmt: skip
    assert [(row["row"], row["reason"]) for row in rejected] == [
        (4, "three of a kind"), (6, "joined with row 2"), (7, "three of a kind"), (9, "three of a kind"),
    ]  # fmt: skip
    assert (report.steps[-1].changed, report.steps[-1].rejected, report.steps[-1].rows_out) == (1, 4, 6)


def test_a_row_that_its_format_cannot_read_is_rejected(tmp_path):
    rows = write_rows(tmp_path / "in.jsonl", ["4"] * 30)
    rows[20]["output"] = None
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = run(tmp_path, "flag")
    (rejected,) = read_rows(tmp_path / "rejected.jsonl")
    assert (rejected["row"], rejected["step"], rejected["values"]) == (21, "read", rows[20])
    assert rejected["reason"] == "'output' is null, expected text"
    assert (report.rows_in, report.rows_out) == (30, 29)


def test_a_rejected_row_that_json_cannot_say_is_kept_as_text(tmp_path):
    half = '{"instruction": "q", "output": "\\ud83d"}'
    (tmp_path / "in.jsonl").write_text(half + '\n{"instruction": "q", "output": "4"}\n')
    run(tmp_path, "flag")
    (rejected,) = read_rows(tmp_path / "rejected.jsonl")
    assert json.loads(rejected["values"]["json"]) == json.loads(half)
    assert "half a surrogate pair" in rejected["reason"]


def test_a_full_disk_is_said_and_the_old_output_stays(tmp_path, monkeypatch):
    write_rows(tmp_path / "in.jsonl", ["4", "4"])
    (tmp_path / "out.jsonl").write_text("old")

    def full(self, *rows):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cleaning.Spill, "append", full)
    with pytest.raises(InputError, match=r"No space left on device\): nothing was written; is there room in .*TMPDIR"):
        run(tmp_path, "unlike")
    assert (tmp_path / "out.jsonl").read_text() == "old"


def test_a_report_that_can_not_be_written_leaves_no_output(tmp_path, monkeypatch):
    write_rows(tmp_path / "in.jsonl", ["4"])
    (tmp_path / "out.jsonl").write_text("old")
    monkeypatch.setattr(cleaning, "replacing", lambda path: (_ for _ in ()).throw(OSError(13, "Permission denied")))
    with pytest.raises(InputError, match=r"--report_path: .*can't be written .Permission denied"):
        run(tmp_path, "flag", report_path=str(tmp_path / "report.json"))
    assert (tmp_path / "out.jsonl").read_text() == "old"
    monkeypatch.undo()
    for name, step in TOYS.items():
        monkeypatch.setitem(STEPS, name, step)
    report = run(tmp_path, "flag", report_path=str(tmp_path / "report.json"))
    assert json.loads((tmp_path / "report.json").read_text()) == report.as_dict()
    with pytest.raises(InputError, match="no row of 1 is left"):
        run(tmp_path, {"empty_answers": {"min_characters": 9}}, report_path=str(tmp_path / "report.json"))
    assert json.loads((tmp_path / "report.json").read_text()) == report.as_dict()  # whole, or as it was


def test_without_a_terminal_a_line_comes_now_and_then(monkeypatch):
    from jindo_core import progress

    said = []
    tell = progress.spoken(said.append)
    tell("reading", 1, 4)
    monkeypatch.setattr(progress, "SPOKEN_EVERY", 0)
    tell("reading", 2, 4)
    tell("writing", 1000, None)
    assert said == ["reading: 50%", "writing: 1,000"]


def test_rows_that_no_step_changed_are_as_they_were(tmp_path):
    row = {"z": None, "output": "a 4", "nested": {"x": [1, 2.5, True]}, "instruction": "q"}  # no input, odd order
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    run(tmp_path, "flag", "unlike", "flag")
    assert (tmp_path / "out.jsonl").read_text() == json.dumps(row) + "\n"


def test_workers_give_what_one_process_gives(tmp_path):
    write_rows(tmp_path / "in.jsonl", [str(i * i % 97) for i in range(2600)])
    steps = ["raw_double", "drop", "triple", "unlike", "flag", {"drop": {"digit": 6}}]
    written, reports = [], []
    for count in (1, 2):
        reports.append(run(tmp_path, *steps, workers=count).as_dict())
        written.append([(tmp_path / f"{name}.jsonl").read_bytes() for name in ("out", "rejected", "flagged")])
    assert written[0] == written[1]
    assert reports[0] == reports[1]


def test_a_worker_that_dies_is_an_error_and_the_old_output_stays(tmp_path):
    write_rows(tmp_path / "in.jsonl", ["4"] * 2000)
    (tmp_path / "out.jsonl").write_text("old")
    with pytest.raises(TrainingError, match="worker process of the refinery died"):
        run(tmp_path, "die", workers=2)
    assert (tmp_path / "out.jsonl").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "recipe.yaml"]


KILLED = """
import sys
from toy_steps import TOYS
from jindo_core.data_config import CleanConfig
from jindo_core.refinery.cleaning import clean
from jindo_core.refinery.recipe import STEPS
if __name__ == "__main__":
    STEPS.update(TOYS)
    folder = sys.argv[1]
    clean(CleanConfig(data_path=f"{folder}/in.jsonl", output_path=f"{folder}/out.jsonl", overwrite=True, workers=2,
                      rejected_path=f"{folder}/rejected.jsonl", recipe=f"{folder}/recipe.yaml"))
"""


def test_killed_in_the_middle_it_leaves_the_old_output_and_no_process(tmp_path, repo_root):
    write_rows(tmp_path / "in.jsonl", ["4"] * 2000)
    (tmp_path / "out.jsonl").write_text("old")
    recipe(tmp_path / "recipe.yaml", {"hang": {"file": str(tmp_path / "worker")}})
    (tmp_path / "job.py").write_text(KILLED)
    paths = os.pathsep.join([str(repo_root), str(repo_root / "tests" / "jindo_core")])
    environment = {**os.environ, "PYTHONPATH": paths}
    job = subprocess.Popen([sys.executable, "job.py", str(tmp_path)], cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "worker").exists():
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    worker = int((tmp_path / "worker").read_text())
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert (tmp_path / "out.jsonl").read_text() == "old"
    assert not (tmp_path / "rejected.jsonl").exists()
    assert not list(tmp_path.glob(".*"))
    while _runs(worker):
        assert time.monotonic() < deadline, "the worker outlived the killed run"
        time.sleep(0.02)


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_dry_run_counts_and_writes_nothing(tmp_path):
    write_rows(tmp_path / "in.jsonl", ["1", "2", "3", "3"])
    dry = run(tmp_path, "drop", "triple", "unlike", "flag", dry_run=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "recipe.yaml"]
    real = run(tmp_path, "drop", "triple", "unlike", "flag")
    assert {**dry.as_dict(), "dry_run": False} == real.as_dict()


def test_a_step_that_breaks_its_word_is_a_defect(tmp_path, monkeypatch):
    write_rows(tmp_path / "in.jsonl", ["4", "4", "4"])
    for name, answer in (("triple", lambda self, item: [item]), ("flag", lambda self, item: [])):
        with monkeypatch.context() as patch:
            patch.setattr(TOYS[name], "__call__", answer)
            with pytest.raises(RuntimeError, match="expected at least two items"):
                run(tmp_path, name)
    monkeypatch.setattr(TOYS["unlike"], "decide", lambda self, keys, numbers: iter([(1, "b"), (0, "a")]))
    with pytest.raises(RuntimeError, match="expected indices in order"):
        run(tmp_path, "unlike")
    monkeypatch.setattr(TOYS["pair"], "leaders", lambda self, keys: [1, 1, 1])
    with pytest.raises(RuntimeError, match="leaders that don't begin a group"):
        run(tmp_path, "pair")
    monkeypatch.setattr(TOYS["pair"], "key", lambda self, item: b"x" * item.number)
    with pytest.raises(RuntimeError, match=r"keys of \[1, 2, 3\] bytes"):
        run(tmp_path, "pair")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_report_that_lost_a_row_says_so():
    report = cleaning.Report("r", "alpaca", False, [cleaning.StepCounts("a", rows_in=3, rows_out=2)], 3, 2)
    with pytest.raises(RuntimeError, match="step a: 3 rows in"):
        report.check()
    report.steps[0].rejected = 1
    report.check()
    report.rows_out = 1
    with pytest.raises(RuntimeError, match="1 rows written, 2 came out"):
        report.check()
    report.rows_in = 4
    with pytest.raises(RuntimeError, match="step a got 3 rows, 4 came out before it"):
        report.check()


def test_a_stale_text_column_is_told_of(tmp_path):
    write_rows(tmp_path / "in.jsonl", ["a\r\nb"], text="an older rendering")
    assert "put rendered_text first" in run(tmp_path, "line_ends").notes[0]
    assert run(tmp_path, "nfc").notes == []


def test_places_that_do_not_serve(tmp_path):
    rows = write_rows(tmp_path / "in.jsonl", ["4", "2"])
    run(tmp_path, "flag")
    with pytest.raises(InputError, match="is there already: give another name, or --overwrite"):
        cleaning.clean(CleanConfig(data_path=str(tmp_path / "in.jsonl"), output_path=str(tmp_path / "out.jsonl")))
    with pytest.raises(InputError, match=r"--flagged_path: got f.csv, expected a name that ends in .jsonl"):
        cleaning.clean(CleanConfig(data_path=str(tmp_path / "in.jsonl"), output_path="o.jsonl", flagged_path="f.csv"))
    with pytest.raises(InputError, match="which is --data_path too"):
        CleanConfig(data_path=str(tmp_path / "in.jsonl"), output_path=str(tmp_path / "in.jsonl"))
    with pytest.raises(InputError, match="lies in --data_path"):
        CleanConfig(data_path=str(tmp_path), output_path=str(tmp_path / "out.jsonl"))
    with pytest.raises(InputError, match="which is --output_path too"):
        CleanConfig(data_path="x.json", output_path="a.jsonl", rejected_path="./a.jsonl")
    with pytest.raises(InputError, match="--output_path: got nothing"):
        CleanConfig(data_path="x.json")
    report = str(tmp_path / "no" / "r.json")
    (tmp_path / "folder").mkdir()
    for path, more in ((report, {"dry_run": True}), (str(tmp_path / "folder"), {"overwrite": True})):
        with pytest.raises(InputError, match=r"the folder of|is a folder, expected a file"):
            cleaning.clean(CleanConfig(data_path=str(tmp_path / "in.jsonl"), output_path=str(tmp_path / "new.jsonl"),
                                       report_path=path, **more))  # fmt: skip
    with pytest.raises(InputError, match="the folder of"):
        cleaning.clean(CleanConfig(data_path=str(tmp_path / "in.jsonl"), dry_run=True, report_path=report))
    with pytest.raises(InputError, match="could not be written"):
        cleaning.clean(CleanConfig(data_path=str(tmp_path / "in.jsonl"), output_path=str(tmp_path / "no" / "o.jsonl")))
    (tmp_path / "dpo.jsonl").write_text(json.dumps({"instruction": "q", "instances": [{"input": "", "output": "a"}]}))
    with pytest.raises(InputError, match="can't be written back: bring the file to another one first"):
        cleaning.clean(CleanConfig(data_path=str(tmp_path / "dpo.jsonl"), output_path=str(tmp_path / "o.jsonl")))
    assert read_rows(tmp_path / "in.jsonl") == rows

