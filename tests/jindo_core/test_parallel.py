"""Several processes train as one does: the same losses, whatever is shared out, and the same bytes when taken up."""

from __future__ import annotations

import random
from datetime import timedelta

import pytest
import torch
from ranks import LETTERS, given, launch, losses, metrics, write_questions, write_rows

from jindo_core import mmlu, outcome, parallel
from jindo_core import train as training
from jindo_core.adapters import WEIGHTS
from jindo_core.config import resolve_train_config
from jindo_core.errors import InputError, TrainingError
from jindo_core.parallel import ALONE, Ranks

QUESTIONS = {"do_mmlu_eval": True, "max_mmlu_samples": 9}
"""Three batches: two ranks with shards run two passes each, one of them for nothing."""

KINDS = {
    "rows": {**QUESTIONS, "predict_with_generate": True, "max_new_tokens": 4},
    "packed": {"packing": True, "batch_size": 3, "micro_batch_size": 1, "val_set_size": 4},
    "by_length": {"group_by_length": True, "optim": "adamw_torch", "lora_target_modules": "all-linear"},
    "recomputed": {"gradient_checkpointing": True, "batch_size": 12, "double_quant": False},
    "few": {"max_train_samples": 2, "max_steps": 3},
}  # fmt: skip
"""few: of three ranks one has no row."""


def like(expected):
    """fp32 sums in another order."""
    return pytest.approx(expected, rel=2e-5)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module", autouse=True)
def cache(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JINDO_CACHE", str(place / "cache"))
        yield


@pytest.fixture(scope="module")
def make(stories260k, place):
    """make("out", …) -> a run's settings."""
    rows = write_rows(place / "rows.json")
    questions = write_questions(place / "questions.json")
    return lambda out, **changes: given(stories260k, rows, place / out, mmlu_path=str(questions), **changes)


@pytest.fixture(scope="module")
def alone(make, place):
    """alone(kind) -> the losses of one process, which trains when it is first asked for."""
    found = {}

    def one(kind):
        if kind not in found:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(outcome, "ANSWER_TOKENS", 2)
                patch.setattr(mmlu, "LETTERS", LETTERS)
                patch.setattr(training, "draw_loss", lambda *_: None)
                threads = torch.get_num_threads()
                torch.set_num_threads(1)  # as a rank has: with more, products sum in another order, step after step
                try:
                    training.train(*resolve_train_config(make(f"alone-{kind}", **KINDS[kind])))
                finally:
                    torch.set_num_threads(threads)
            found[kind] = losses(place / f"alone-{kind}")
        return found[kind]

    return one


@pytest.fixture(scope="module")
def two(make, place):
    """What two ranks say of their jobs."""
    saved = {"save_steps": 3}
    jobs = {kind: {"settings": make(f"two-{kind}", **saved | more)} for kind, more in KINDS.items() if kind != "few"}
    jobs["shards"] = {"settings": make("two-shards", fsdp=True, **QUESTIONS)}
    jobs["shards_again"] = {"settings": make("two-shards_again", fsdp=True, gradient_checkpointing=True, batch_size=5)}
    jobs["dropout"] = {"settings": make("two-dropout", save_steps=3, lora_dropout=0.2, report_to="tensorboard")}
    jobs["stopped"] = {"settings": make("two-stopped", save_steps=3, lora_dropout=0.2), "signal": [1, 4]}
    jobs["resumed"] = {"settings": make("two-stopped", save_steps=3, lora_dropout=0.2, resume=True)}
    jobs["short"] = {"settings": make("two-short"), "memory": [1, 2]}
    jobs["short_rows"] = {"settings": make("two-short_rows"), "rows_memory": [1, 3]}
    jobs["slow_end"] = {"settings": make("two-slow_end", max_steps=1), "slow_end": str(place / "drawn")}
    jobs["failed_end"] = {"settings": make("two-failed_end", max_steps=1), "slow_end": ""}
    jobs["short_update"] = {"settings": make("two-short_update"), "update_memory": [0, 2]}
    jobs["nan"] = {"settings": make("two-nan"), "nan": [1, 3]}
    jobs["half"] = {"settings": make("two-half"), "signal": [0, 5]}
    jobs["sharded_half"] = {"settings": make("two-sharded_half", fsdp=True), "signal": [1, 5]}
    jobs["taken_up"] = {"settings": make("two-sharded_half", resume=True)}
    jobs["host"] = {"settings": make("two-host"), "host": [1, 3]}
    jobs["host_again"] = {"settings": make("two-host", resume=True)}
    jobs["wrong"] = {"settings": make("two-wrong", data_path=str(place / "none.json"))}
    jobs["constants"] = {"settings": make("two-constants"), "absmax": True}
    jobs["codes"] = {"settings": make("two-codes"), "packed": True}
    jobs["two_dirs"] = {"settings": make("two-rows")}
    return launch(place / "two", 2, jobs)


@pytest.fixture(scope="module")
def three(make, place, two):
    """What three ranks say, some of them going on from what two left."""
    jobs = {kind: {"settings": make(f"three-{kind}", **KINDS[kind])} for kind in ("rows", "packed", "few")}
    jobs["more"] = {"settings": make("two-half", resume=True)}
    jobs["shards"] = {"settings": make("three-shards", fsdp=True, **KINDS["few"])}
    return launch(place / "three", 3, jobs)[0]


# --- the same as one --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "few"])
def test_two_ranks_learn_as_one_process(kind, alone, two, place):
    assert [said["ended"] for said in two[0][kind]] == ["well", "well"]
    assert losses(place / f"two-{kind}") == like(alone(kind))
    assert two[0][kind][0]["adapter"] == two[0][kind][1]["adapter"]


@pytest.mark.parametrize("kind", ["rows", "packed", "few"])
def test_three_ranks_learn_as_one_process(kind, alone, three, place):
    assert [said["ended"] for said in three[kind]] == ["well"] * 3
    assert losses(place / f"three-{kind}") == like(alone(kind))


def test_shards_hold_a_half_and_learn_the_same(alone, two, place):
    assert losses(place / "two-shards") == like(alone("rows"))
    whole = two[0]["rows"][0]["matrix_bytes"]
    assert [said["matrix_bytes"] for said in two[0]["shards"]] == pytest.approx([whole / 2] * 2, rel=0.01)
    for name in ("shards", "shards_again"):  # the second one's layers run twice
        assert [said["whole_at_once"] for said in two[0][name]] == [1, 1]
    assert two[0]["rows"][0]["whole_at_once"] == 5


def test_shards_of_checkpointed_layers_and_an_idle_rank(alone, two, three, place):
    """A rank without a row still takes part in every layer."""
    assert [said["ended"] for said in two[0]["shards_again"]] == ["well", "well"]
    assert losses(place / "three-shards") == like(alone("few"))


def test_rank_0_writes_and_speaks_alone(two, place):
    files = {path.name for path in (place / "two-rows").iterdir()}
    assert files == {
        "adapter_model.safetensors", "adapter_config.json", "metrics.jsonl", "jindo_run.json", "checkpoint-3",
        "checkpoint-6", "README.md", "predictions.jsonl", "metrics.json",
    }  # fmt: skip
    assert len(list((place / "two-dropout" / "runs").iterdir())) == 1
    assert two[1].stdout.count("Memory plan") == sum(said[0]["prepared"] for said in two[0].values())
    assert [row["step"] for row in metrics(place / "two-rows") if "loss" in row] == list(range(1, 9))


@pytest.mark.parametrize("name", ["two-rows", "three-rows", "two-shards"])
def test_questions_are_shared_out_and_answered_as_by_one(name, alone, two, three, place):
    alone("rows")
    one, found = ([row for row in metrics(place / who) if "mmlu_loss" in row] for who in ("alone-rows", name))
    assert [row["step"] for row in found] == [0, 4, 8]
    assert found[0] == one[0], "the same weights yet: the same bits"
    for row, expected in zip(found, one, strict=True):
        assert row.pop("mmlu_loss") == like(expected.pop("mmlu_loss"))
        assert row == expected


def test_the_first_rank_answers_the_rows_held_out(alone, two, three, place):
    alone("rows")
    told = [(place / name / "predictions.jsonl").read_text() for name in ("alone-rows", "two-rows", "three-rows")]
    assert len(told[0].splitlines()) == 5
    assert told[0] == told[1] == told[2]


# --- going on ---------------------------------------------------------------------------------------------


def test_a_signal_to_one_rank_stops_all_and_the_run_goes_on_to_the_same_bytes(two, place):
    """With dropout, which differs between the ranks: each takes up its own generator."""
    whole, stopped, resumed = (two[0][name] for name in ("dropout", "stopped", "resumed"))
    assert {said["code"] for said in stopped} == {143}
    assert sorted(said["ended"] for said in stopped) == ["Stopped", "SystemExit"], "one of them tells the user"
    assert [said["ended"] for said in resumed] == ["well", "well"]
    assert (place / "two-stopped" / WEIGHTS).read_bytes() == (place / "two-dropout" / WEIGHTS).read_bytes()
    assert losses(place / "two-stopped") == losses(place / "two-dropout")
    assert whole[0]["random"] != whole[1]["random"]
    assert [said["random"] for said in whole] == [said["random"] for said in resumed]


def test_three_ranks_go_on_where_two_stopped(alone, three, two, place):
    assert {said["code"] for said in two[0]["half"]} == {143}
    assert [said["ended"] for said in three["more"]] == ["well"] * 3
    assert losses(place / "two-half") == like(alone("rows"))
    assert [row["step"] for row in metrics(place / "two-half") if "loss" in row] == list(range(1, 9))


def test_one_process_goes_on_where_ranks_stopped(alone, make, two, place):
    """The base is known again though it lay in shards."""
    assert {said["code"] for said in two[0]["sharded_half"]} == {143}
    assert [said["ended"] for said in two[0]["taken_up"]] == ["well", "well"]
    assert losses(place / "two-sharded_half") == like(alone("rows"))


# --- what goes wrong on one rank --------------------------------------------------------------------------


def test_when_one_runs_out_of_memory_all_give_way(alone, two, place):
    assert [said["gave_way"] for said in two[0]["short"]] == [["moments"]] * 2
    assert losses(place / "two-short") == like(alone("rows"))


def test_when_one_has_no_memory_for_its_rows_all_give_way(alone, two, place):
    """Before they count what is learnt: or else one asks how the step went, and the other for a sum."""
    assert [said["ended"] for said in two[0]["short_rows"]] == ["well", "well"]
    assert [said["gave_way"] for said in two[0]["short_rows"]] == [["moments"]] * 2
    assert losses(place / "two-short_rows") == like(alone("rows"))


def test_when_one_s_host_runs_out_of_memory_all_give_way_and_stop(alone, two, place):
    """At once, for nothing is left there; each says what is true of itself."""
    stopped, again = two[0]["host"], two[0]["host_again"]
    assert {said["code"] for said in stopped} == {75}
    assert [said["gave_way"] for said in stopped + again] == [["moments", "layers", "layers", "layers"]] * 4
    assert [said["ended"] for said in again] == ["well", "well"]
    assert losses(place / "two-host") == like(alone("rows"))


def test_an_update_is_made_once_though_another_rank_tries_again(alone, two, place):
    assert [said["ended"] for said in two[0]["short_update"]] == ["well", "well"]
    assert [said["gave_way"] for said in two[0]["short_update"]] == [["moments"]] * 2
    assert losses(place / "two-short_update") == like(alone("rows"))
    assert two[0]["short_update"][0]["adapter"] == two[0]["short_update"][1]["adapter"]


def test_a_gradient_that_is_not_finite_on_one_is_skipped_by_all(two, place):
    assert [said["ended"] for said in two[0]["nan"]] == ["well", "well"]
    assert [row["skipped_steps"] for row in metrics(place / "two-nan") if "loss" in row] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert two[0]["nan"][0]["adapter"] == two[0]["nan"][1]["adapter"]


def test_the_first_rank_s_constants_are_everybody_s(alone, two, place):
    """Their last bits depend on the number of threads. Another base is not taken for that."""
    assert losses(place / "two-constants") == like(alone("rows"))
    assert {said["ended"] for said in two[0]["codes"]} == {"TrainingError", "SystemExit"}
    spoken = next(said for said in two[0]["codes"] if said["ended"] == "TrainingError")
    assert spoken["text"] == "the base model's weights of rank 1 differ from rank 0's: give all ranks the same"


@pytest.mark.parametrize(("name", "words"), [("wrong", "does not exist"), ("two_dirs", "holds another run")])
def test_wrong_input_is_said_once(name, words, two):
    assert sorted(said["ended"] for said in two[0][name]) == ["InputError", "SystemExit"]
    spoken, silent = sorted(two[0][name], key=lambda said: said["ended"])
    assert words in spoken["text"]
    assert silent["code"] == 2


def test_the_others_wait_for_the_first_one_s_end_where_no_limit_is(two):
    """At a meeting, which has one, they come when it has drawn and written all."""
    assert [said["ended"] for said in two[0]["slow_end"]] == ["well", "well"]
    assert [said["after_the_first"] for said in two[0]["slow_end"]] == [True, True]


def test_a_first_rank_that_fails_at_the_end_is_waited_for_by_nobody(two):
    """The others would wait for it without a limit, and torchrun may run on another machine."""
    assert sorted(said["ended"] for said in two[0]["failed_end"]) == ["SystemExit", "TrainingError"]
    assert [said["code"] for said in two[0]["failed_end"] if said["ended"] == "SystemExit"] == [1]


def test_a_step_has_six_short_messages_and_one_with_the_gradients(two, repo_root):
    """As docs/parallel.md says; of steps without a measurement or a checkpoint behind them. Here every step looks at
    its host's memory, which takes two more."""
    for said in two[0]["rows"]:
        for step in (2, 5):
            sizes = sorted(said["messages"][step - 1])
            assert sizes[:-1] == [8] * (6 + 2)
            assert sizes[-1] > 1000
    assert "six messages of 8 bytes" in (repo_root / "docs" / "parallel.md").read_text(encoding="utf-8")


# --- by itself --------------------------------------------------------------------------------------------


def test_every_row_is_one_rank_s_and_the_work_is_even():
    chance = random.Random(0)
    for _ in range(200):
        size, most = chance.randint(1, 5), chance.randint(1, 6)
        rows = list(range(chance.randint(1, 40)))
        lengths = [chance.randint(1, 100) for _ in rows]
        batches = [rows[i : i + 7] for i in range(0, len(rows), 7)]
        shares = [Ranks(rank, size).share(batches, most, lengths.__getitem__) for rank in range(size)]
        assert sorted(row for own in shares for piece in own for row in piece) == rows
        assert all(1 <= len(piece) <= most for own in shares for piece in own)
        assert sum(map(bool, shares)) == min(size, len(rows)), "no rank is idle while another has two rows"
        costs = [[len(piece) * max(lengths[row] for row in piece) for piece in own] for own in shares]
        assert max(map(sum, costs)) - min(map(sum, costs)) <= max(map(max, filter(None, costs)))
        padded = [Ranks(rank, size, sharded=True).share(batches, most, lengths.__getitem__) for rank in range(size)]
        assert len({len(own) for own in padded}) == 1
        assert [[piece for piece in own if piece] for own in padded] == shares or size == 1


def test_alone_nothing_changes_hands():
    batches = [[3, 1, 2, 0], [5, 4]]
    assert ALONE.share(batches, 3, lambda _: 1 / 0) == [[3, 1, 2], [0], [5, 4]]
    assert ALONE.deal(batches) == batches
    assert (ALONE.worst(2), ALONE.totals(3, 0.5), ALONE.gather("x"), ALONE.first(lambda: 7)) == (2, (3, 0.5), ["x"], 7)
    parameter = torch.nn.Parameter(torch.ones(2))
    assert ALONE.sum_gradients([parameter], torch.tensor(1.5)).item() == 1.5
    assert parameter.grad is None
    state = torch.get_rng_state()
    ALONE.diverge(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("variables", "changes", "words"),
    [
        ({"WORLD_SIZE": "2"}, {}, "RANK is missing: expected all of torchrun's variables"),
        ({"WORLD_SIZE": "two"}, {}, "WORLD_SIZE is 'two', expected a number of processes"),
        ({}, {"fsdp": True}, "--fsdp: got it in one process, expected several: torchrun"),
        ("all", {"device": "cuda:1"}, "--device: got cuda:1 for 2 processes, expected cuda: each takes its own"),
        ("all", {"device": "cuda"}, "got 2 processes for 0 GPUs, expected one for each"),
        ("all", {"fsdp": True, "offload_layers": 2}, "--offload_layers: got it beside --fsdp"),
        ("all", {"fsdp": True, "predict_with_generate": True}, "--predict_with_generate: got it beside --fsdp, whose"),
    ],
)
def test_what_does_not_go_together_is_refused(variables, changes, words, make, monkeypatch):
    if variables == "all":
        variables = dict(zip(parallel._VARIABLES, ("0", "1", "2", "localhost", "1"), strict=True))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    config, _, _ = resolve_train_config(make("none", **changes))
    with pytest.raises(InputError, match=words), parallel.joined(config):
        pytest.fail("nothing begins")


def test_a_first_rank_that_hangs_is_not_waited_for_without_end():
    class Store:
        def __init__(self):
            self.asked = 0

        def check(self, names):
            self.asked += names == ["first/0"]
            return False

    store = Store()
    other = Ranks(1, 2, store=store)
    with pytest.raises(TrainingError, match="rank 1 has waited 0 minutes for rank 0, which hangs or whose disk does"):
        other.first(lambda: pytest.fail("it is not the first"), limit=timedelta(seconds=0.12))
    assert store.asked >= 3
    assert timedelta(minutes=30) <= parallel.ALONE_LIMIT


def test_idle_gpus_are_named(make, monkeypatch):
    config, _, _ = resolve_train_config(make("none", device="auto"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert "4 GPUs are visible and one is used: torchrun --nproc-per-node 4 -m jindo_core" in parallel.advice(config)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert parallel.advice(config) is None
