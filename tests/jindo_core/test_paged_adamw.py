"""PagedAdamW: torch.optim.AdamW and bitsandbytes' AdamW8bit are the oracles."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import weakref

import bitsandbytes as bnb
import pytest
import torch
from adamw_trials import BUDGETS, SMALL, assert_same_state, full_disk, groups, make_params, run, set_gradients
from torch import nn

import jindo_core
import jindo_core.paged_adamw as module
from jindo_core.adamw_pages import capacity
from jindo_core.adamw_state import WRAPPED
from jindo_core.errors import InputError
from jindo_core.kernels import native
from jindo_core.paged_adamw import PagedAdamW
from jindo_core.pager import Pager
from jindo_core.pages import PAGE_BYTES


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


def test_large_gradients_are_finite():
    """Their squares' sum is not."""
    params = make_params()
    optimizer, before = PagedAdamW(params), params[0].detach().clone()
    set_gradients(params, 1)
    params[0].grad.fill_(1e30)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert not torch.equal(params[0], before)


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


EVICTING = """
from pathlib import Path
import torch
from torch import nn
from jindo_core.memory import give_back_freed
from jindo_core.paged_adamw import PagedAdamW

def private():
    give_back_freed()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))

param = nn.Parameter(torch.zeros(8 << 20))
param.grad = torch.ones_like(param)
optimizer = PagedAdamW([param])
optimizer.step()
before = private()
assert optimizer.evict() == 64 << 20
evicted = private()
optimizer.step()
print(before - evicted, before - private())
"""


def test_eviction_gives_a_cpu_s_memory_back():
    """What is paged lies in a file's pages, which are the process's own no more. In a process of its own: what the C
    allocator gives back depends on all that went before."""
    done = subprocess.run([sys.executable, "-c", EVICTING], capture_output=True, text=True, check=True)
    evicted, stepped = map(int, done.stdout.split())
    assert evicted > 60 << 20
    assert stepped > (60 - 3 * 4) << 20, "but for the three buffers"


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
