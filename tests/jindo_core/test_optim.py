"""Schedules as transformers', and the optimizer by name."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from jindo_core.errors import InputError
from jindo_core.optim import SCHEDULES, build_optimizer, learning_rate_factor


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_equal_transformers(name, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs_name = "constant_with_warmup" if name == "constant" else name
    scheduler = get_scheduler(theirs_name, optimizer, num_warmup_steps=warmup, num_training_steps=40)
    for step in range(40):
        assert learning_rate_factor(name, step, 40, warmup) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="optim is 'adamw'"):
        build_optimizer("adamw", [], lr=1e-3, weight_decay=0.0)
    with pytest.raises(InputError, match="lr_scheduler_type is 'step'"):
        learning_rate_factor("step", 5, 10, 0)
