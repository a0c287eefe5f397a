"""AdamW's states: torch's and bitsandbytes' are loaded, and load ours; what does not fit changes nothing."""

from __future__ import annotations

import copy
import os

import bitsandbytes as bnb
import pytest
import torch
from adamw_trials import BUDGETS, SMALL, assert_same_state, full_disk, groups, make_params, run
from torch import nn

from jindo_core.adamw_state import WRAPPED
from jindo_core.errors import InputError
from jindo_core.kernels import adamw
from jindo_core.paged_adamw import PagedAdamW


def torch_reference(steps=3):
    params = make_params()
    optimizer = torch.optim.AdamW(groups(params))
    run(optimizer, params, steps, without=(1,))
    return params, optimizer


@pytest.mark.parametrize("budget", BUDGETS)
def test_torch_s_state_is_loaded_and_gone_on_with(budget):
    theirs, reference = torch_reference()
    ours = [nn.Parameter(p.detach().clone()) for p in theirs]
    optimizer = PagedAdamW(groups(ours), resident_bytes=BUDGETS[budget])
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    for side, params in ((optimizer, ours), (reference, theirs)):
        run(side, params, 2, 4)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("budget", BUDGETS)
def test_torch_loads_ours(budget):
    ours, theirs = make_params(), make_params()
    optimizer = PagedAdamW(groups(ours), resident_bytes=BUDGETS[budget])
    reference = torch.optim.AdamW(groups(theirs))
    for side, params in ((optimizer, ours), (reference, theirs)):
        run(side, params, 3, without=(1,))
    saved, wanted = optimizer.state_dict(), reference.state_dict()
    assert set(saved["state"]) == set(wanted["state"]) - {6}, "torch counts the empty tensor"
    for i, state in saved["state"].items():
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(state[name], wanted["state"][i][name]) for name in state)
    assert [set(group) for group in saved["param_groups"]] == [set(group) for group in wanted["param_groups"]]
    fresh = torch.optim.AdamW(groups(ours))
    fresh.load_state_dict(saved)
    for side, params in ((fresh, ours), (reference, theirs)):
        run(side, params, 2, 4)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_8_bit_state_comes_back_bit_for_bit_and_from_bitsandbytes():
    params = make_params()
    optimizer = PagedAdamW(groups(params), state_bits=8)
    run(optimizer, params, 3)
    saved, twin = optimizer.state_dict(), [nn.Parameter(p.detach().clone()) for p in params]
    other = PagedAdamW(groups(twin), state_bits=8, resident_bytes=0)
    other.load_state_dict(saved)
    for side, own in ((optimizer, params), (other, twin)):
        run(side, own, 2, 4)
    assert all(torch.equal(a, b) for a, b in zip(params, twin, strict=True))

    theirs = make_params()
    reference = bnb.optim.AdamW8bit(groups(theirs))
    run(reference, theirs, 3)
    ours = [nn.Parameter(p.detach().clone()) for p in theirs]
    loaded = PagedAdamW(groups(ours), state_bits=8)
    loaded.load_state_dict(reference.state_dict())
    found = loaded.state_dict()["state"]
    for i, state in reference.state_dict()["state"].items():
        if i in found:  # the empty tensor is not
            assert all(torch.equal(found[i][WRAPPED][name], value) for name, value in state[WRAPPED].items())

    twin = [nn.Parameter(p.detach().clone()) for p in ours]
    back = bnb.optim.AdamW8bit(groups(twin))
    back.load_state_dict(loaded.state_dict())
    for side, own in ((back, twin), (reference, theirs)):
        run(side, own, 2, 4)
    assert all(torch.equal(a, b) for a, b in zip(twin, theirs, strict=True))


def test_moments_of_one_kind_load_into_the_other():
    _, reference = torch_reference()
    narrow = PagedAdamW(groups(make_params()), state_bits=8)
    narrow.load_state_dict(reference.state_dict())
    wide = PagedAdamW(groups(make_params()))
    wide.load_state_dict(narrow.state_dict())
    found, wanted = wide.state_dict()["state"], reference.state_dict()["state"]
    for i, state in found.items():
        for name in ("exp_avg", "exp_avg_sq"):
            assert (state[name] - wanted[i][name]).abs().max() <= 0.04 * wanted[i][name].abs().max()


def _spoiled(state, fault):
    """The state of `SMALL` parameters in 8 bits, with a fault; parameter 4 is a large one."""
    group, inner = state["param_groups"][0], state["state"][4][WRAPPED]
    match fault:
        case "no groups":
            del state["param_groups"]
        case "other groups":
            state["param_groups"] = state["param_groups"][:1]
        case "no betas":
            del group["betas"]
        case "negative lr":
            group["lr"] = -1.0
        case "amsgrad":
            group["amsgrad"] = True
        case "Adam's decay":
            group["decoupled_weight_decay"] = False
        case "unknown parameter":
            state["state"][99] = state["state"].pop(4)
        case "no step":
            del state["state"][4]["step"]
        case "half a step":
            state["state"][4]["step"] = torch.tensor(1.5)
        case "other shape":
            inner["state2"] = inner["state2"][:-1]
        case "no state2" | "no absmax1" | "no qmap2":
            del inner[fault.removeprefix("no ")]
        case "short absmax2" | "short qmap1":
            inner[fault.removeprefix("short ")] = inner[fault.removeprefix("short ")][:-1]
        case "floats for codes":
            inner["state2"] = inner["state2"].float()
        case "codes for floats":
            inner["absmax1"] = inner["absmax1"].byte()
        case "no tensor":
            inner["state1"] = None
    return state


FAULTS = {
    "no groups": "has no param_groups", "other groups": r"groups of \[3\] parameters, the optimizer of \[3, 5\]",
    "no betas": "group 0 has no betas: it is another optimizer's", "negative lr": "group 0 has lr -1.0",
    "amsgrad": "made with amsgrad", "Adam's decay": "Adam's, with weight_decay 0.1",
    "unknown parameter": "parameter 99", "no step": "parameter 4 has .*, expected also step",
    "half a step": r"step tensor\(1.5", "other shape": "has state2",
    "no state2": "expected also state2", "no absmax1": "expected also absmax1", "no qmap2": "expected also qmap2",
    "short absmax2": r"absmax2 \(35,\), expected \(36,\)", "short qmap1": r"qmap1 \(255,\)",
    "floats for codes": "state2 of torch.float32, expected uint8", "codes for floats": "absmax1 of torch.uint8",
    "no tensor": "has state1 NoneType",
}  # fmt: skip


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_state_that_does_not_fit_changes_nothing(fault, bits):
    optimizer = PagedAdamW(groups(make_params(shapes=SMALL)), state_bits=bits)
    for group in optimizer.param_groups:
        run(optimizer, group["params"], 1)
    other = PagedAdamW(groups(make_params(shapes=SMALL)), lr=0.5, state_bits=8)
    for group in other.param_groups:
        run(other, group["params"], 2)
    good = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=f"^the state.*{FAULTS[fault]}"):
        optimizer.load_state_dict(_spoiled(other.state_dict(), fault))
    assert_same_state(optimizer, good)


def test_states_of_other_optimizers():
    params, theirs = make_params(shapes=SMALL), make_params(shapes=SMALL)
    optimizer = PagedAdamW(params)
    for other in (torch.optim.SGD(theirs, momentum=0.9), torch.optim.Adam(theirs, weight_decay=0.1)):
        with pytest.raises(ValueError, match=r"another optimizer's|is Adam's"):
            optimizer.load_state_dict(other.state_dict())
    adam = torch.optim.Adam(theirs, lr=1e-2)
    run(adam, theirs, 2)
    for param, moved in zip(params, theirs, strict=True):
        param.data.copy_(moved)
    optimizer.load_state_dict(adam.state_dict())
    for side, own in ((optimizer, params), (adam, theirs)):
        run(side, own, 2, 3)
    assert all(torch.equal(a, b) for a, b in zip(params, theirs, strict=True)), "without decay they are one"


def test_codes_of_another_map_keep_their_values():
    params = make_params(shapes=[(64, 64)])
    optimizer = PagedAdamW(params, state_bits=8)
    run(optimizer, params, 2)
    saved = optimizer.state_dict()
    inner = saved["state"][0][WRAPPED]
    inner["qmap1"] = inner["qmap1"] / 2
    optimizer.load_state_dict(saved)
    found, cpu = optimizer.state_dict()["state"][0][WRAPPED], torch.device("cpu")
    halved = adamw.decode(inner["state1"].view(-1), inner["absmax1"], inner["qmap1"])
    got = adamw.decode(found["state1"].view(-1), found["absmax1"], adamw.dynamic_map(cpu))
    assert (got - halved).abs().max() <= 0.01 * halved.abs().max()


@pytest.mark.parametrize("bits", [32, 8])
def test_loading_into_a_full_store_changes_nothing(bits, monkeypatch):
    ours, twin = make_params(shapes=SMALL), make_params(shapes=SMALL)
    optimizer, unharmed = (PagedAdamW(groups(p), state_bits=bits, resident_bytes=0) for p in (ours, twin))
    run(optimizer, ours, 2)
    run(unharmed, twin, 2)
    other_params = make_params(shapes=SMALL)
    other = PagedAdamW(groups(other_params), state_bits=bits, lr=0.7)
    run(other, other_params, 5)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full_disk)
        with pytest.raises(InputError, match="no room"):
            optimizer.load_state_dict(other.state_dict())
    assert_same_state(optimizer, unharmed.state_dict())
    run(optimizer, ours, 2, 3)
    run(unharmed, twin, 2, 3)
    assert all(torch.equal(a, b) for a, b in zip(ours, twin, strict=True))
