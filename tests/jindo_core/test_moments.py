"""AdamW's moments one parameter at a time, out of pages and into them: every bit, and few of them at once."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from jindo_core import optim, paged_adamw
from jindo_core.optim import build_optimizer

# More than a page of moments in one tensor, small ones beside it, one that never gets a gradient.
SHAPES = [(40,), (1200, 700), (64, 64), (3, 5), (300, 300)]


def trained(name, steps, seed=0, **more):
    """(optimizer, parameters) after so many steps; the third one has a gradient in every second step only."""
    torch.manual_seed(seed)
    params = [Parameter(torch.randn(shape)) for shape in SHAPES] + [Parameter(torch.randn(7))]
    optimizer = build_optimizer(name, params, lr=1e-2, weight_decay=0.01, **more)
    advance(optimizer, params, range(steps))
    return optimizer, params


def advance(optimizer, params, steps):
    for step in steps:
        draw = torch.Generator().manual_seed(100 + step)
        for number, param in enumerate(params[:-1]):
            gradient = torch.randn(param.shape, generator=draw)
            param.grad = None if number == 2 and step % 2 else gradient
        optimizer.step()


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
@pytest.mark.parametrize("resident", [0, "auto"])
def test_moments_that_were_streamed_go_on_bit_for_bit(name, resident):
    one, params = trained(name, 3, resident_bytes=resident)
    updates = optim.updates(one)
    number = {param: i for i, param in enumerate(params)}
    assert {number[param]: n for param, n in updates.items()} == {0: 3, 1: 3, 2: 2, 3: 3, 4: 3}
    sizes = optim.moment_bytes(one)
    kept = {}
    for param, moments in optim.stream_moments(one):
        assert {part: value.nbytes for part, value in moments.items()} == sizes[param]
        assert all(value.dim() == 1 and value.device.type == "cpu" for value in moments.values())
        kept[number[param]] = moments
    assert [number[param] for param in updates] == [number[param] for param in sizes] == list(kept)

    other, copies = trained(name, 0, seed=5)
    with torch.no_grad():
        for copy, param in zip(copies, params, strict=True):
            copy.copy_(param)
    steps = {copies[i]: updates[params[i]] for i in kept}
    optim.load_moments(other, steps, {copies[i]: moments for i, moments in kept.items()})
    for optimizer, own in ((one, params), (other, copies)):
        advance(optimizer, own, range(3, 6))
    for param, copy in zip(params, copies, strict=True):
        assert torch.equal(param, copy)


@pytest.mark.parametrize("name", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_few_moments_are_in_memory_at_once(name, monkeypatch):
    """Each of the parameters is gathered from its pages, given out and let go of."""
    optimizer, _ = trained(name, 1)
    made, alive = paged_adamw.adamw_state.empty, []

    def counted(param, bits):
        moments = made(param, bits)
        alive.append(param)
        return moments

    monkeypatch.setattr(paged_adamw.adamw_state, "empty", counted)
    most = 0
    for param, _ in optimizer.stream_moments():
        most = max(most, len(alive))
        alive.remove(param)
    assert alive == []
    assert most == 1


def test_moments_are_asked_for_one_parameter_at_a_time():
    one, _ = trained("paged_adamw_32bit", 1)
    kept, asked = dict(one.stream_moments()), []

    class Asked(dict):
        def __getitem__(self, param):
            asked.append(param)
            return super().__getitem__(param)

    one.load_moments(one.updates, Asked(kept))
    assert len(asked) == len(kept), "also the one that lies in several pages"


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_moments_that_do_not_fit_are_refused_and_change_nothing(name):
    one, params = trained(name, 2)
    steps, kept = optim.updates(one), dict(optim.stream_moments(one))
    for spoil in (
        lambda moments: {part: value[:-1] for part, value in moments.items()},
        lambda moments: dict(list(moments.items())[:1]),
    ):
        other, copies = trained(name, 2, seed=0)
        wrong = {copies[i]: kept[param] for i, param in enumerate(params) if param in kept}
        wrong[copies[1]] = spoil(wrong[copies[1]])
        same = {copies[i]: steps[param] for i, param in enumerate(params) if param in kept}
        with pytest.raises(ValueError, match="moments of a parameter of"):
            optim.load_moments(other, same, wrong)
        if name != "adamw_torch":
            after = dict(optim.stream_moments(other))
            assert all(
                torch.equal(after[copies[i]][part], value)
                for i, param in enumerate(params) if param in kept for part, value in kept[param].items()
            )  # fmt: skip
