"""What the tests of PagedAdamW and of its states share: parameters, steps, faults."""

from __future__ import annotations

import torch
from torch import nn

from jindo_core.adamw_state import WRAPPED
from jindo_core.pages import PAGE_BYTES

# Small and odd ones, one larger than a page of fp32 moments, and an empty one.
SHAPES = [(8, 576), (33, 7), (), (3,), (1000, 1003), (192, 8), (0, 4), (64, 64)]
SMALL = [*SHAPES[:4], (90, 100), *SHAPES[5:]]
BUDGETS = {"all": "auto", "half": PAGE_BYTES, "none": 0}


def make_params(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(params, step, *, without=()):
    generator = torch.Generator().manual_seed(100 + step)
    for i, param in enumerate(params):
        gradient = torch.randn(param.shape, generator=generator).to(param.dtype)
        param.grad = None if i in without else gradient


def groups(params):
    return [
        {"params": params[:3], "lr": 3e-3, "weight_decay": 0.1},
        {"params": params[3:], "betas": (0.8, 0.99)},
    ]


def run(optimizer, params, steps, first=1, **more):
    for step in range(first, first + steps):
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = 1e-2 / step * (i + 1)
        set_gradients(params, step, **more)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def assert_same_state(optimizer, wanted):
    found = optimizer.state_dict()
    assert found["param_groups"] == wanted["param_groups"]
    assert list(found["state"]) == list(wanted["state"])
    for ours, theirs in zip(found["state"].values(), wanted["state"].values(), strict=True):
        assert torch.equal(ours.pop("step"), theirs["step"])
        kept, other = ours.get(WRAPPED, ours), theirs.get(WRAPPED, theirs)
        assert all(torch.equal(value, other[name]) for name, value in kept.items())


def full_disk(fd, start, length):
    raise OSError(28, "No space left on device")
