"""PagedAdamW: torch.optim.AdamW and bitsandbytes' AdamW8bit are the oracles."""

from __future__ import annotations

import contextlib
import copy
import os
import weakref
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

import jindo_core
import jindo_core.paged_adamw as module
from jindo_core.adamw_pages import capacity
from jindo_core.adamw_state import WRAPPED
from jindo_core.errors import InputError
from jindo_core.kernels import adamw, native
from jindo_core.memory import give_back_freed
from jindo_core.paged_adamw import PagedAdamW
from jindo_core.pager import Pager
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


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("store", ["host", "file"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trajectory_is_torch_s_bit_for_bit(budget, store, dtype, tmp_path):
    """Groups, a changing lr, clipping, parameters without a gradient; in 16 bits torch computes in fp32 copies."""
    ours, theirs = make_params(dtype), make_params(torch.float32)
    if dtype != torch.float32:
        for param, wide in zip(ours, theirs, strict=True):
            wide.data = param.detach().float()
    place = tmp_path if store == "file" else "host"
    optimizer = PagedAdamW(groups(ours), resident_bytes=BUDGETS[budget], store=place)
    reference = torch.optim.AdamW(groups(theirs))
    if dtype == torch.float32:
        for first in (1, 4):
            for side, params in ((optimizer, ours), (reference, theirs)):
                run(side, params, 3, first, without=(1, 4) if first == 4 else ())
        for param, wanted in zip(ours, theirs, strict=True):
            assert torch.equal(param, wanted)
        return
    set_gradients(ours, 1)
    for param, wide in zip(ours, theirs, strict=True):
        wide.grad = param.grad.float()
    optimizer.step()
    reference.step()
    for param, wanted in zip(ours, theirs, strict=True):
        assert torch.equal(param, wanted.to(dtype))


@pytest.mark.parametrize("level", native.LEVELS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_8_bit_moments_are_bitsandbytes(budget, level):
    """Its CPU kernel differs from its CUDA one, which ours follows, by less than a code a step."""
    ours, theirs = make_params(), make_params()
    with native.level(level):
        optimizer = PagedAdamW(groups(ours), state_bits=8, resident_bytes=BUDGETS[budget])
        reference = bnb.optim.AdamW8bit(groups(theirs))
        run(optimizer, ours, 5)
        run(reference, theirs, 5)
    start = make_params()
    for param, wanted, before in zip(ours, theirs, start, strict=True):
        if param.numel() == 0:
            continue
        moved = (wanted - before).abs().mean()
        assert (param - wanted).abs().mean() <= 0.02 * moved
    wide = [state[WRAPPED]["state1"].dtype == torch.float32 for state in optimizer.state_dict()["state"].values()]
    assert wide == [p.numel() < 4096 for p in ours if p.numel()]


@pytest.mark.parametrize("bits", [32, 8])
def test_the_budget_changes_nothing(bits, tmp_path):
    results = []
    for budget, store in [("auto", "host"), (PAGE_BYTES, tmp_path), (0, "host"), (1 << 40, "host")]:
        params = make_params()
        optimizer = PagedAdamW(groups(params), state_bits=bits, resident_bytes=budget, store=store)
        run(optimizer, params, 2)
        optimizer.evict()
        run(optimizer, params, 2, 3)
        optimizer.regrow(2 * PAGE_BYTES)
        run(optimizer, params, 2, 5)
        results.append(params)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_small_tensors_share_pages():
    params = make_params(shapes=[(8, 64)] * 300)
    optimizer = PagedAdamW(params, resident_bytes=0)
    set_gradients(params, 1)
    optimizer.step()
    assert optimizer.state_bytes == PAGE_BYTES
    assert (optimizer.counters.pages_in, optimizer.counters.pages_out) == (1, 1)
    assert optimizer.resident_bytes == 0


def test_joined_updates_are_the_same(monkeypatch):
    """What a GPU does: neighbours in a page in one call."""
    results, calls = [], []
    real_step = module._step_flat
    monkeypatch.setattr(module, "_step_flat", lambda *given: (calls.append(1), real_step(*given)))
    for joined in (0, 1 << 16):
        monkeypatch.setattr(module, "JOINED_ON_CPU", joined)
        params = make_params(shapes=[(8, 64), (32, 8), (5, 5), (16, 16), (16, 32)])
        for bits in (32, 8):
            optimizer = PagedAdamW(params, state_bits=bits)
            run(optimizer, params, 2)
            run(optimizer, params, 1, 3, without=(1,))
        results.append((params, len(calls)))
        calls.clear()
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    assert results[1][1] < results[0][1]


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


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_step_with_gradients_that_are_not_finite_is_skipped(wrong):
    params = make_params()
    optimizer = PagedAdamW(groups(params), resident_bytes=0)
    run(optimizer, params, 2)
    before, states = [p.detach().clone() for p in params], optimizer.state_dict()
    set_gradients(params, 3)
    params[4].grad.view(-1)[77] = wrong
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    for i, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[name], states["state"][i][name]) for name in state)
    run(optimizer, params, 1, 3)
    assert not torch.equal(params[0], before[0])


def test_parameters_that_come_later():
    ours, theirs = make_params(), make_params()
    for params in (ours, theirs):
        params[1].requires_grad_(False)
    sides = (PagedAdamW(ours[:5], resident_bytes=0), ours), (torch.optim.AdamW(theirs[:5]), theirs)
    for optimizer, params in sides:
        set_gradients(params[:5], 1, without=(1,))
        optimizer.step()
        optimizer.add_param_group({"params": params[5:], "lr": 0.1})
        params[1].requires_grad_(True)
        set_gradients(params, 2)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_schedule_and_a_closure():
    ours, theirs = make_params(), make_params()
    sides = (PagedAdamW(ours, lr=0.1), ours), (torch.optim.AdamW(theirs, lr=0.1), theirs)
    for optimizer, params in sides:
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
        for step in range(3):

            def closure(params=params, optimizer=optimizer):
                optimizer.zero_grad()
                loss = sum(p.square().sum() for p in params)
                loss.backward()
                return loss

            assert optimizer.step(closure) is not None
            schedule.step()
            assert step >= 0
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_full_store_is_an_error_before_the_step(tmp_path, monkeypatch):
    params = make_params()
    optimizer = PagedAdamW(groups(params), resident_bytes=0, store=tmp_path)
    before = [p.detach().clone() for p in params]

    def full(fd, start, length):
        raise OSError(28, "No space left on device")

    set_gradients(params, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(InputError, match="no room"):
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert optimizer.state_dict()["state"] == {}
    optimizer.step()
    reference = make_params()
    other = torch.optim.AdamW(groups(reference))
    set_gradients(reference, 1)
    other.step()
    assert all(torch.equal(a, b) for a, b in zip(params, reference, strict=True))


def test_no_room_for_what_should_stay_pages_it_and_says_so(monkeypatch):
    real = Pager._new_buffer
    calls = []

    def short(self):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self)

    monkeypatch.setattr(Pager, "_new_buffer", short)
    ours, theirs = make_params(), make_params()
    optimizer, reference = PagedAdamW(ours), torch.optim.AdamW(theirs)
    with pytest.warns(UserWarning, match="cpu has no room for .* all are paged"):
        run(optimizer, ours, 1)
    run(reference, theirs, 1)
    assert optimizer.resident_bytes == 0
    for side, params in ((optimizer, ours), (reference, theirs)):
        run(side, params, 2, 2)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1.0}, "got lr -1.0"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"state_bits": 16}, "state_bits 16, expected 32 or 8"),
        ({"state_bits": "8"}, "state_bits '8', expected 32 or 8"),
        ({"resident_bytes": -1}, "resident_bytes -1"),
        ({"resident_bytes": "some"}, "resident_bytes 'some'"),
        ({"store": "/nowhere/at/all"}, "can't be written to"),
        ({"store": None}, "got the place None: expected 'host' or a folder"),
        ({"store": ""}, "got the place ''"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        PagedAdamW(make_params(), **change)


def test_refuses_a_parameter_that_is_not_contiguous():
    with pytest.raises(ValueError, match=r"strides \(1, 4\).*make it .contiguous\(\)"):
        PagedAdamW([nn.Parameter(torch.zeros(3, 4).t())])


def test_refuses_a_parameter_of_another_dtype():
    with pytest.raises(ValueError, match=r"torch.float64 parameter of shape \(3,\), .*with .float\(\), or freeze it"):
        PagedAdamW([nn.Parameter(torch.zeros(3, dtype=torch.float64))])


def test_frozen_parameters_may_be_of_any_kind():
    """As `PagedAdamW(model.parameters())` has them of a quantized model."""
    ours, theirs = make_params(shapes=SMALL), make_params(shapes=SMALL)
    frozen = [
        nn.Parameter(value, requires_grad=False)
        for value in (torch.ones(8, dtype=torch.uint8), torch.zeros(3, 4).t(), torch.zeros(5, dtype=torch.float64))
    ]
    optimizer, reference = PagedAdamW([*frozen, *ours]), torch.optim.AdamW([*frozen, *theirs])
    for side, params in ((optimizer, ours), (reference, theirs)):
        run(side, params, 2)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    before = [p.detach().clone() for p in ours]
    frozen[2].requires_grad_(True)
    set_gradients([*ours, frozen[2]], 3)
    with pytest.raises(ValueError, match=r"torch\.float64 parameter"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))


def test_the_caller_may_know_that_the_gradients_are_finite(monkeypatch):
    def looked_at(gradients):
        raise AssertionError("gradients looked at")

    monkeypatch.setattr(module, "_all_finite", looked_at)
    params = make_params()
    optimizer, before = PagedAdamW(groups(params)), params[0].detach().clone()
    set_gradients(params, 1)
    optimizer.step(finite=True)
    assert not torch.equal(params[0], before)
    with pytest.raises(AssertionError, match="looked at"):
        optimizer.step()


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


def assert_same_state(optimizer, wanted):
    found = optimizer.state_dict()
    assert found["param_groups"] == wanted["param_groups"]
    assert list(found["state"]) == list(wanted["state"])
    for ours, theirs in zip(found["state"].values(), wanted["state"].values(), strict=True):
        assert torch.equal(ours.pop("step"), theirs["step"])
        kept, other = ours.get(WRAPPED, ours), theirs.get(WRAPPED, theirs)
        assert all(torch.equal(value, other[name]) for name, value in kept.items())


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


def full_disk(fd, start, length):
    raise OSError(28, "No space left on device")


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


def test_a_full_store_keeps_the_moments_where_they_are(monkeypatch):
    params = make_params()
    optimizer = PagedAdamW(groups(params))
    run(optimizer, params, 1)
    held = optimizer.resident_bytes
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full_disk)
        with pytest.raises(InputError, match="no room"):
            optimizer.evict()
        assert optimizer.resident_bytes == held > 0
        more = nn.Parameter(torch.ones(5))
        optimizer.add_param_group({"params": [more]})
        run(optimizer, [more], 1)
    assert optimizer.resident_bytes == optimizer.state_bytes == held + PAGE_BYTES, "nor is the budget gone"


class Device:
    """One with room for so many of a pager's buffers at a time."""

    def __init__(self, room, real):
        self.room, self.real, self.given = room, real, []

    def new_buffer(self, pager):
        if sum(given() is not None for given in self.given) >= self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        buffer = self.real(pager)
        self.given.append(weakref.ref(buffer))
        return buffer


@pytest.mark.parametrize(("room", "stay"), [(0, 0), (3, 3), (4, 3)])
def test_laid_out_anew_without_memory_keeps_the_moments(room, stay, monkeypatch):
    """Room for no page at all, or for the former three, where there are four now, with or without a buffer."""
    device = Device(99, Pager._new_buffer)
    monkeypatch.setattr(Pager, "_new_buffer", lambda pager: device.new_buffer(pager))
    ours, theirs = make_params(), make_params()
    optimizer, reference = PagedAdamW(groups(ours)), torch.optim.AdamW(groups(theirs))
    for side, params in ((optimizer, ours), (reference, theirs)):
        run(side, params, 3)
        params.append(nn.Parameter(torch.ones(7)))
        side.add_param_group({"params": params[-1:], "lr": 0.1})
        set_gradients(params, 4)
    assert optimizer.resident_bytes == 3 * PAGE_BYTES
    wanted, values = optimizer.state_dict(), [p.detach().clone() for p in ours]
    device.room = room
    said = "all are paged" if stay == 0 else "12 MiB stay there, the rest is paged"
    fails = contextlib.nullcontext() if room == 4 else pytest.raises(torch.OutOfMemoryError)
    with pytest.warns(UserWarning, match=f"cpu has no room for 16 MiB of AdamW's moments: {said}"), fails:
        optimizer.step()
    assert optimizer.resident_bytes == stay * PAGE_BYTES
    if room != 4:
        assert all(torch.equal(a, b) for a, b in zip(ours, values, strict=True))
        assert_same_state(optimizer, wanted)
        optimizer.evict()
        device.room = 3
        optimizer.step()
    reference.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_auto_stays_below_the_process_s_cap(monkeypatch):
    gib, device = 1 << 30, torch.device("cuda", 0)
    said = {"mem_get_info": (10 * gib, 16 * gib), "memory_reserved": 3 * gib, "max_memory_allocated": 2 * gib}
    for name, value in said.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    optimizer = PagedAdamW(make_params())
    for fraction, expected in [(1.0, 11 * gib), (0.25, 2 * gib), (0.125, 0)]:
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _, share=fraction: share)
        assert optimizer._affordable(device, 1 << 20) == max(expected - module.MARGIN, 0)
    assert optimizer._affordable(device, 3) == 0
    held = Pager(jindo_core.pages.PageStore(), torch.device("cpu"), units=5, unit_bytes=PAGE_BYTES, resident=2)
    optimizer._pagers[device] = held
    assert optimizer._affordable(device, 3) == 2 * PAGE_BYTES, "those pages found room already"


def test_eviction_gives_a_cpu_s_memory_back():
    """What is paged lies in a file's pages, which are the process's own no more."""
    param = nn.Parameter(torch.zeros(8 << 20))
    param.grad = torch.ones_like(param)
    optimizer = PagedAdamW([param])
    optimizer.step()
    give_back_freed()
    before = private_bytes()
    assert optimizer.evict() == 64 << 20
    give_back_freed()
    assert before - private_bytes() > 60 << 20
    optimizer.step()
    give_back_freed()
    assert before - private_bytes() > 60 - 3 * 4 << 20, "but for the three buffers"


def private_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def test_a_step_without_memory_changes_nothing(monkeypatch):
    """What runs out does so before the first update; the step can then be tried again."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(30, 1000)), nn.Parameter(torch.randn(900, 700))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizer, oracle = PagedAdamW(ours, lr=1e-2, resident_bytes=0), torch.optim.AdamW(theirs, lr=1e-2)
    for turn in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape[::-1]).t()  # not row-major
            b.grad = a.grad.clone()
        if turn == 1:
            before, state = [p.detach().clone() for p in ours], optimizer.state_dict()
            for name in ("prepare", "_new_buffer"):
                with monkeypatch.context() as short:
                    short.setattr(Pager, name, _out_of_memory)
                    for slot in (slot for pager in optimizer._pagers.values() for slot in pager._slots):
                        slot.buffer = slot.unit = None
                    with pytest.raises(torch.OutOfMemoryError):
                        optimizer.step()
            assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))
            assert str(optimizer.state_dict()) == str(state)
        optimizer.step()
        oracle.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_the_pages_capacity():
    assert capacity(32) * 8 == PAGE_BYTES
    assert capacity(8) % 256 == 0
    assert capacity(8) // 256 * (512 + 8) <= PAGE_BYTES


def test_it_is_exported():
    assert jindo_core.PagedAdamW is PagedAdamW
