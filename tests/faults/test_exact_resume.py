"""A run that was stopped and taken up again ends as the one that was not: every byte of the adapter."""

from __future__ import annotations

import pytest

from jindo_core import checkpoint
from jindo_core.adapters import WEIGHTS
from jindo_core.errors import Stopped
from jindo_core.train import train

KINDS = {
    "32 bits": {},
    "8 bits, packed, all layers": {
        "optim": "paged_adamw_8bit", "packing": True, "lora_target_modules": "all-linear", "lora_r": 64,
        "batch_size": 4, "micro_batch_size": 2,
    },
    "torch's, by length, recomputed": {
        "optim": "adamw_torch", "group_by_length": True, "gradient_checkpointing": True,
    },
    "moments outside, uneven epochs": {"resident_optimizer_MB": 0, "batch_size": 12, "lr_scheduler_type": "cosine"},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_resumed_is_as_never_stopped(kind, settings, stop_after, metrics, tmp_path):
    more = KINDS[kind]
    whole = train(*settings("whole", **more))
    stop_after(4)
    with pytest.raises(Stopped, match=r"stopped by SIGTERM after step 4: .*checkpoint-4 is saved") as stopped:
        train(*settings("parts", **more))
    assert stopped.value.code == 143
    assert not (tmp_path / "parts" / WEIGHTS).exists()
    resumed = train(*settings("parts", **more, resume=True))
    assert (tmp_path / "parts" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert (resumed.steps, resumed.loss_before, resumed.loss_after) == (8, whole.loss_before, whole.loss_after)
    logs = [metrics(tmp_path / name) for name in ("parts", "whole")]
    same = ("step", "loss", "eval_loss", "learning_rate", "grad_norm", "tokens", "epoch")
    rows = [[{name: row.get(name) for name in same} for row in log] for log in logs]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == [0, *range(1, 9), 8]


def test_checkpoints_and_measurements_at_the_end_of_each_epoch(settings, stop_after, metrics, tmp_path):
    """Five steps to an epoch; also where the run was stopped within one."""
    more = {"save_strategy": "epoch", "evaluation_strategy": "epoch", "max_steps": 12}
    train(*settings("whole", **more))
    stop_after(7)
    with pytest.raises(Stopped):
        train(*settings("parts", **more))
    train(*settings("parts", **more, resume=True))
    assert (tmp_path / "parts" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    for name, steps in (("whole", [5, 10]), ("parts", [5, 7, 10])):
        assert sorted(found.step for found in map(checkpoint.read, checkpoint.folders(tmp_path / name))) == steps
        assert [row["step"] for row in metrics(tmp_path / name) if "eval_loss" in row] == [0, 5, 10, 12]


def test_a_run_that_has_ended_is_left_as_it_is(settings, tmp_path, capsys):
    """Whatever its newest checkpoint's step; and goes further where more is asked for."""
    whole, out = train(*settings("out")), tmp_path / "out"
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    again = train(*settings("out", resume=True))
    assert again == whole
    said = " ".join(capsys.readouterr().out.split())
    assert "has ended, and nothing is left to do: --max_steps N goes further" in said
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert train(*settings("out", resume=True, max_steps=9)).steps == 9
    (out / "metrics.jsonl.part").touch()  # as a run leaves it that was killed, and another ended in the folder before
    assert train(*settings("out", resume=True, max_steps=9)).loss_before == whole.loss_before
    assert "Going on after step" in capsys.readouterr().out
