"""`--fsdp` and memory: what a real rank holds is what was planned, and a budget is kept by all ranks alike."""

from __future__ import annotations

import importlib
import shutil
from types import SimpleNamespace

import pytest
from ranks import given, launch, write_rows

from jindo_core.config import resolve_train_config
from jindo_core.errors import InputError
from jindo_core.parallel import ALONE, Ranks
from jindo_core.plan import SHAPES, Job, plan
from jindo_core.prepare import _check_host

MB = 1_000_000
BESIDE = 500 * MB
STEPS = {"fsdp": True, "processes": 2, "tokens": 64, "micro_batch": 2, "dropout": 0.05}


@pytest.fixture(scope="module")
def two(stories15m, tmp_path_factory):
    """What two ranks say: of runs whose storages are counted, of budgets, and of the simulation's steps made real."""
    place = tmp_path_factory.mktemp("shards")
    rows = write_rows(place / "rows.json")

    def job(name, **changes):
        usual = {"fsdp": True, "max_steps": 2, "lora_r": 8, "micro_batch_size": 2, "val_set_size": 0, "eval_steps": 9}
        return {"settings": given(stories15m, rows, place / name, **(usual | changes))}

    jobs = {
        "plain": job("plain") | {"live": True},
        "again": job("again", gradient_checkpointing=True) | {"live": True},
        "whole": job("whole", fsdp=False) | {"live": True},
        "codes16": job("codes16", quantize="none") | {"live": True},
        # Rank 1 has less room than rank 0: what it lacks, both do without.
        "budget": job("budget", max_memory_MB=610, micro_batch_size=4) | {"process": [BESIDE, BESIDE + 15 * MB]},
        "too_little": job("too_little", max_memory_MB=550) | {"process": [BESIDE] * 2},
        "steps": {"shape": "tiny", "steps": STEPS | {"checkpointed_layers": 1}},
        "steps_again": {"shape": "tiny", "steps": STEPS | {"checkpointed_layers": 2, "accumulation": 1}},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JINDO_CACHE", str(place / "cache"))
        return launch(place / "two", 2, jobs)[0]


@pytest.mark.parametrize("kind", ["plain", "again", "whole", "codes16"])
def test_a_rank_holds_what_is_planned(kind, two):
    for said in two[kind]:
        assert said["ended"] == "well", said
        planned = said["planned"]
        assert said["matrix_bytes"] == planned["weights"]
        # A CPU's chunk of logits lies in a buffer that stays; the plan, a GPU's, has it at the head alone.
        beside = 0 if "loss_chunk" in planned["at_peak"] else said["at_peak"]["scratch"]
        assert said["peak"] - beside == pytest.approx(planned["peak_bytes"] - planned["context"], rel=0.05)
    if kind == "plain":
        assert planned["weights"] * 2 == two["whole"][0]["planned"]["weights"]


@pytest.mark.parametrize("kind", ["steps", "steps_again"])
def test_a_simulated_rank_is_a_real_one(kind, two, repo_root):
    """fully_shard over gloo, and over a process group that only pretends: the same bytes at the peak."""
    simulation = importlib.import_module("bench.simulation")
    changes = {"steps": {"checkpointed_layers": 1}, "steps_again": {"checkpointed_layers": 2, "accumulation": 1}}[kind]
    found = simulation.simulate(simulation.SHAPES["tiny"], simulation.Step(**STEPS | changes), cuda=False)
    for said in two[kind]:
        assert said["peak"] == found.peak - simulation.COMPILED
        assert said["at_peak"] == found.at_peak


def test_a_budget_is_kept_by_all_alike(two):
    first, second = two["budget"]
    assert [said["ended"] for said in two["budget"]] == ["well", "well"], two["budget"]
    assert first["planned"] == second["planned"]
    assert first["planned"]["peak_bytes"] <= 610 * MB
    assert first["planned"]["settings"] != two["plain"][0]["planned"]["settings"]
    assert first["planned"]["settings"]["offload_layers"] == 0


def test_a_budget_that_can_not_be_kept_ends_all(two):
    ended = {said["ended"] for said in two["too_little"]}
    assert ended == {"InputError", "SystemExit"}
    text = next(said["text"] for said in two["too_little"] if said["ended"] == "InputError")
    assert "--max_memory_MB: got 550, but with everything offloaded" in text
    assert "share the layers among more processes" in text


def test_what_all_ranks_of_a_machine_offload_must_have_room(tmp_path, monkeypatch):
    found = plan(Job(sizes=SHAPES["llama2-7b"], resident_states=0, processes=2))
    config, *_ = resolve_train_config({"offload_folder": str(tmp_path)})
    room = found.host_bytes * 3 // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=room))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    _check_host(config, found, False, ALONE.beside)
    with pytest.raises(InputError, match="MB are to lie there"):
        _check_host(config, found, False, Ranks(0, 2).beside)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # the other one is on another machine
    _check_host(config, found, False, Ranks(0, 2).beside)
