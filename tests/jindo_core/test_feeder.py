"""Rows are read ahead of the run, and nothing else is: not the cursor, not the other ranks, not what fails."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import pytest
import torch

from jindo_core import feeder as feeding
from jindo_core import train as training
from jindo_core.adapters import WEIGHTS
from jindo_core.config import resolve_train_config
from jindo_core.data.batches import BatchCursor
from jindo_core.data.examples import IGNORE, Example
from jindo_core.data.packing import Pack
from jindo_core.data.store import TokenizedRows
from jindo_core.errors import InputError
from jindo_core.feeder import Feeder, StepRows
from jindo_core.parallel import ALONE, Ranks

LENGTHS = torch.tensor([3, 9, 5, 7, 2, 8, 6, 4, 9, 3, 5]).numpy()


class Rows:
    """Examples that say which thread asked for them; `fails`: numbers that can't be read."""

    def __init__(self):
        self.lengths, self.asked, self.fails = LENGTHS, [], {}

    def __getitem__(self, number):
        self.asked.append((number, threading.current_thread() is threading.main_thread()))
        if number in self.fails:
            raise self.fails[number]
        ids = [number] * int(LENGTHS[number])
        return Example(ids, [IGNORE, *ids[1:]])


def make(micro_batch=2, ranks=ALONE):
    model = SimpleNamespace(device=torch.device("cpu"))
    return SimpleNamespace(
        model=model, relief=SimpleNamespace(micro_batch=micro_batch), tokenizer=SimpleNamespace(pad_id=0),
        examples=Rows(), ranks=ranks,
    )  # fmt: skip


def cursor(**changes):
    given = {"batch_size": 2, "accumulation": 2, "group_by_length": False, "seed": 7}
    return BatchCursor(LENGTHS, **given | changes)


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("feeder")]


def test_steps_are_the_cursors_and_it_moves_with_them():
    job, moved, alone = make(), cursor(), cursor()
    with Feeder(job, moved, 8) as feeder:  # three to an epoch
        for _ in range(8):
            step = next(feeder)
            assert list(step) == next(alone)
            assert moved.state() == alone.state(), "the next step is being read, and the cursor is where the run is"
            for own, numbers in zip(step.collated(), step, strict=True):
                assert [row[0].item() for row in own.input_ids] == numbers
    assert not threads()
    assert not any(main for _, main in job.examples.asked)
    assert len(job.examples.asked) == 8 // 3 * 11 + 8, "nothing is read beyond the last step"
    assert next(moved) == next(alone)


def test_a_cursor_goes_on_from_a_fork():
    one = cursor()
    next(one)
    other = one.fork()
    ahead = [next(other) for _ in range(6)]
    assert one.state()["step"] == 1
    assert [next(one) for _ in range(6)] == ahead


def test_smaller_micro_batches_are_read_again_and_so_is_a_step_that_is_tried_again():
    job = make(micro_batch=2)
    with Feeder(job, cursor(), 3) as feeder:
        step = next(feeder)
        first = step.collated()
        assert [len(own.input_ids) for own in first] == [2, 2]
        job.relief.micro_batch = 1
        again = step.collated()
        assert [len(own.input_ids) for own in again] == [1, 1, 1, 1]
        assert sum(len(own.supervised) for own in again) == sum(len(own.supervised) for own in first)
        later = next(feeder)  # which was read for two
        assert [len(own.input_ids) for own in later.collated()] == [1, 1, 1, 1]
        assert [len(own.input_ids) for own in next(feeder).collated()] == [1, 1, 1]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_reads_its_own_rows_alone(rank):
    job = make(ranks=Ranks(rank, 2))  # without a process group: whoever talked to the other would fail
    with Feeder(job, cursor(), 1) as feeder:
        step = next(feeder)
        own = job.ranks.share(list(step), 2, lambda i: int(LENGTHS[i]))
        assert [[row[0].item() for row in batch.input_ids] for batch in step.collated()] == own
    assert {number for number, _ in job.examples.asked} == {number for batch in own for number in batch}


def test_a_rank_without_rows_learns_nothing():
    job = make(ranks=Ranks(1, 2, sharded=True))
    (own,) = StepRows(job, [[4]]).collated()
    assert own.supervised.tolist() == []


@pytest.mark.parametrize("error", [InputError("cut short"), MemoryError(), OSError(5, "Input/output error")])
def test_what_fails_is_raised_at_its_step_and_may_be_tried_again(error):
    job, moved = make(), cursor()
    second = [next(alone := cursor()), next(alone)][1]
    job.examples.fails[second[0][0]] = error
    with Feeder(job, moved, 3) as feeder:
        next(feeder).collated()
        step = next(feeder)
        with pytest.raises(type(error)) as caught:
            step.collated()
        assert caught.value is error
        job.examples.fails.clear()
        assert [[row[0].item() for row in own.input_ids] for own in step.collated()] == second
        next(feeder).collated()


def test_no_thread_is_left_behind_an_interrupt():
    def interrupted():
        with Feeder(make(), cursor(), 5) as feeder:
            next(feeder)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not threads()


def test_supervised_places_are_those_of_the_loss_packs_too():
    job = make()
    packs = [Pack([5, 6, 7, 8, 9], [IGNORE, 6, IGNORE, IGNORE, 9], (2, 3)), Example([1, 2, 3], [IGNORE, 2, 3])]
    job.examples = SimpleNamespace(lengths=[5, 3], __getitem__=None)
    found = feeding._collate(packs, 0, torch.device("cpu"))
    assert found.documents == [(2, 3, 3), (3, 5)]
    assert found.supervised.tolist() == [0, 3, 8, 9]  # before tokens 1 and 4 of the first, 1 and 2 of the second


@pytest.fixture
def settings(stories260k, tmp_path):
    data = [{"instruction": f"Count {i}.", "output": "one two three" + " and" * (i % 5)} for i in range(24)]
    (tmp_path / "rows.json").write_text(json.dumps(data))
    given = {
        "base_model": str(stories260k), "data_path": str(tmp_path / "rows.json"), "batch_size": 8,
        "micro_batch_size": 4, "max_steps": 4, "val_set_size": 0, "lora_r": 2, "lora_dropout": 0.2, "save_steps": 0,
        "prompt_template_name": "alpaca_short", "device": "cpu", "dtype": "fp32", "cutoff_len": 96,
    }  # fmt: skip
    return lambda out, **more: resolve_train_config(given | {"output_dir": str(tmp_path / out)} | more)


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_ends_the_same_and_says_what_it_waited(packing, settings, tmp_path, monkeypatch):
    training.train(*settings("ahead", packing=packing))
    original = training.Feeder
    monkeypatch.setattr(training, "Feeder", lambda *given: original(*given, ahead=False))
    training.train(*settings("own", packing=packing))
    assert (tmp_path / "ahead" / WEIGHTS).read_bytes() == (tmp_path / "own" / WEIGHTS).read_bytes()
    for name in ("ahead", "own"):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        waited = [row["input_seconds"] for row in rows if "loss" in row]
        assert len(waited) == 4
        assert all(0 < one < rows[-1]["seconds"] for one in waited)
    assert not threads()


def test_a_store_that_is_cut_short_stops_the_run_in_words(settings, tmp_path, monkeypatch):
    """While the first step runs, rows of a later one vanish."""
    original = training.take_step

    def cut(job, rows, number, *rest):
        if number == 2:
            monkeypatch.setattr(TokenizedRows, "_read", failing)
        return original(job, rows, number, *rest)

    def failing(*_):
        raise InputError("a file of tokenized rows was cut short while it was in use: start the run again")

    monkeypatch.setattr(training, "take_step", cut)
    with pytest.raises(InputError, match="cut short"):
        training.train(*settings("out"))
    steps = (tmp_path / "out" / "metrics.jsonl.part").read_text().count('"grad_norm"')
    assert steps in (2, 3), "the step that was read before is made"
    assert not threads()
