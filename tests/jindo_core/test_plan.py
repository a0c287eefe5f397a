"""The planner's arithmetic: the goals, and what it changes to fit. tests/test_simulation.py holds it to real steps."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from jindo_core.budget import fit
from jindo_core.plan import LINEARS, SHAPES, Job, as_json, plan

QLORA = {"lora_r": 8, "targets": LINEARS, "length": 512, "micro_batch": 1, "dropout": 0.0}


def job(shape="llama2-7b", **given):
    return Job(sizes=SHAPES[shape], **(QLORA | given))


@pytest.mark.parametrize(
    ("shape", "budget"), [("llama2-7b", 5.4e9), ("llama2-13b", 10e9), ("llama-33b", 20e9), ("llama-65b", 40e9)]
)
def test_the_goals(shape, budget):
    """All linear layers, r 8, 512 tokens, every weight resident, 0.5 GB of CUDA context."""
    found, _, fits = fit(job(shape), int(budget))
    assert fits
    assert found.offload_layers == 0
    assert plan(found).peak_bytes <= budget
    assert plan(found).rows["context"] == 500_000_000


def test_a_model_larger_than_the_gpu_still_fits():
    found, changes, fits = fit(job("llama2-70b"), int(8e9))
    assert fits
    assert 0 < found.offload_layers <= 80
    assert "streamed" in changes[-1].text
    rows = plan(found)
    assert rows.elsewhere["offloaded_weights"] > 30e9
    assert rows.host_bytes >= rows.elsewhere["offloaded_weights"]


def test_nothing_is_changed_that_need_not_be():
    assert fit(job(), int(80e9)) == (job(), [], True)


@pytest.mark.parametrize("budget", [4.6e9, 5.0e9, 5.4e9, 6e9, 8e9])
def test_no_change_is_idle(budget):
    """Without any one of the changes it would not fit."""
    start = job(micro_batch=4)
    found, changes, fits = fit(start, int(budget))
    assert fits
    undone = 0
    fields = ("resident_states", "offload_embedding", "checkpointed_layers", "offload_checkpoints", "offload_layers")
    for field in fields:
        if getattr(found, field) != getattr(start, field):
            undone += 1
            tried = dataclasses.replace(found, **{field: getattr(start, field)})
            assert plan(tried).peak_bytes > budget, field
    assert len(changes) >= undone


def test_layers_are_checkpointed_as_many_as_needed():
    full, none = plan(job(checkpointed_layers=32)).peak_bytes, plan(job()).peak_bytes
    found, _, fits = fit(job(resident_states=0, offload_embedding=True), int((full + none) / 2) - 300_000_000)
    assert fits
    assert 0 < found.checkpointed_layers < 32


def test_an_impossible_budget_changes_everything_and_says_no():
    found, changes, fits = fit(job(micro_batch=4), int(0.6e9))
    assert not fits
    assert found.offload_layers == 32
    assert found.micro_batch == 1
    assert found.offload_head
    assert len(changes) == 7


def test_a_smaller_micro_batch_keeps_the_step():
    found, _, _ = fit(job(micro_batch=6, accumulation=2, length=4096), int(5.2e9))
    assert found.micro_batch < 6
    assert found.micro_batch * found.accumulation == 12
    found, _, _ = fit(job(micro_batch=5, length=4096), int(5.2e9))
    assert (found.micro_batch, found.accumulation) == (1, 5), "2 would leave a row out"


def test_rows_add_up_and_the_json_has_every_name():
    found = plan(job(offload_layers=3, offload_checkpoints=True, resident_states=0, offload_embedding=True))
    assert found.peak_bytes == sum(found.rows.values())
    content = as_json(job(), 10**10)
    for name in (
        "weights", "constants", "embedding", "head", "norms", "adapters", "gradients", "optimizer_resident",
        "optimizer_paged", "activations", "checkpoints", "recompute", "scratch", "loss_chunk", "streaming_buffers",
        "allocator", "context", "offloaded_weights", "peak_bytes", "host_bytes",
    ):  # fmt: skip
        assert isinstance(content[name], int), name
    assert content["fits"] is True
    assert as_json(job(), None)["fits"] is None


def test_eight_bit_moments_are_a_quarter():
    wide, narrow = (plan(job(state_bits=bits)).rows["optimizer_resident"] for bits in (32, 8))
    assert narrow == pytest.approx(wide / 4, rel=0.1)


def test_it_needs_no_torch():
    code = "import sys, jindo_core.plan; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
