"""AdamW's moments as checkpoints hold them: torch.optim.AdamW's shape, and bitsandbytes' where they are quantized."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from jindo_core.adamw_pages import bits_of
from jindo_core.kernels import adamw

WRAPPED = "__bnb_optimizer_quant_state__"
"""bitsandbytes' key of a parameter's quantized moments in a state dict."""

NUMBERS = ("lr", "betas", "eps", "weight_decay")

Moments = dict[str, Tensor]
"""Of one parameter, flat, on the CPU: exp_avg and exp_avg_sq; or codes1, codes2, absmax1 and absmax2."""


class Loaded(NamedTuple):
    """What a state dict says, checked. groups: what it sets in each group."""

    groups: list[dict[str, Any]]
    steps: dict[Parameter, int]
    moments: dict[Parameter, Moments]


def empty(param: Tensor, bits: int) -> Moments:
    """Zeros. bits: of this parameter's moments."""
    count = param.numel()
    if bits == 32:
        return {name: torch.zeros(count) for name in ("exp_avg", "exp_avg_sq")}
    codes = {name: torch.zeros(count, dtype=torch.uint8) for name in ("codes1", "codes2")}
    return codes | {name: torch.zeros(-(-count // adamw.BLOCK)) for name in ("absmax1", "absmax2")}


def named(found: Moments, param: Tensor, bits: int) -> dict[str, Any]:
    """A parameter's moments under a checkpoint's names. bits: the optimizer's."""
    if bits == 32:
        return {name: value.view(param.shape) for name, value in found.items()}
    if "exp_avg" in found:
        return {WRAPPED: {f"state{i}": value.view(param.shape) for i, value in enumerate(found.values(), 1)}}
    cpu = torch.device("cpu")
    inner = {
        "state1": found["codes1"].view(param.shape), "state2": found["codes2"].view(param.shape),
        "absmax1": found["absmax1"], "absmax2": found["absmax2"],
        "qmap1": adamw.dynamic_map(cpu).clone(), "qmap2": adamw.unsigned_map(cpu).clone(),
    }  # fmt: skip
    return {WRAPPED: inner}


def torch_defaults() -> dict[str, Any]:
    """The keys that torch.optim.AdamW expects in a group."""
    return dict(torch.optim.AdamW([Parameter(torch.empty(0))]).defaults)


def loaded(state_dict: dict[str, Any], own: list[dict[str, Any]], bits: int) -> Loaded:
    """Read torch.optim.AdamW's, bitsandbytes' AdamW8bit's or PagedAdamW's, with moments of either kind.

    Args:
        own: the optimizer's groups, which it must fit. bits: of the optimizer's moments.
    Raises:
        ValueError: it does not fit, is another optimizer's, or lacks something.
    """
    groups = _checked_groups(state_dict, own)
    params = [param for group in own for param in group["params"]]
    place = {key: i for i, key in enumerate(key for group in groups for key in group["params"])}
    steps, moments = {}, {}
    for key, packed in state_dict["state"].items():
        if key not in place:
            raise ValueError(f"the state is of a parameter {key!r}, which is in none of its groups")
        # bitsandbytes puts quantized moments into a dictionary of their own.
        found = {name: value for name, value in packed.items() if name != WRAPPED} | packed.get(WRAPPED, {})
        param = params[place[key]]
        _check_state(found, param, f"the state of parameter {place[key]}")
        steps[param] = _step(found["step"], f"the state of parameter {place[key]}")
        moments[param] = _converted(found, param, bits_of(param, bits))
    # initial_lr: of a learning-rate schedule.
    return Loaded([{k: g[k] for k in (*NUMBERS, "initial_lr") if k in g} for g in groups], steps, moments)


def check_numbers(group: dict[str, Any], who: str) -> None:
    """ValueError where a group's numbers are out of bounds. who: begins the message."""
    lr, (beta1, beta2), eps, decay = (group[name] for name in NUMBERS)
    if not (lr >= 0 and 0 <= beta1 < 1 and 0 <= beta2 < 1 and eps >= 0 and decay >= 0):
        raise ValueError(
            f"{who} lr {lr}, betas {(beta1, beta2)}, eps {eps}, weight_decay {decay}, expected "
            "lr, eps and weight_decay of at least 0 and betas in [0, 1)"
        )


def _checked_groups(state_dict: dict[str, Any], own: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if missing := {"state", "param_groups"} - set(state_dict):
        raise ValueError(f"the state has no {', '.join(sorted(missing))}: expected an optimizer's state_dict()")
    groups: list[dict[str, Any]] = state_dict["param_groups"]
    for number, group in enumerate(groups):
        lacks = [name for name in ("params", *NUMBERS) if name not in group]
        if lacks:
            raise ValueError(
                f"the state's group {number} has no {', '.join(lacks)}: it is another optimizer's, expected AdamW's"
            )
        check_numbers(group, f"the state's group {number} has")
        for name in ("amsgrad", "maximize"):
            if group.get(name):
                raise ValueError(f"the state was made with {name}, which PagedAdamW does not have")
        if group.get("decoupled_weight_decay") is False and group["weight_decay"]:
            raise ValueError(
                f"the state's group {number} is Adam's, with weight_decay {group['weight_decay']} added to the "
                "gradient, which PagedAdamW does not do: expected AdamW's, or a weight_decay of 0"
            )
    sizes = [[len(group["params"]) for group in side] for side in (groups, own)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the state has groups of {sizes[0]} parameters, the optimizer of {sizes[1]}")
    return groups


def _check_state(found: dict[str, Any], param: Tensor, what: str) -> None:
    """ValueError where something is missing, or of another shape or kind. what: begins the message."""
    names = ("exp_avg", "exp_avg_sq") if "exp_avg" in found else ("state1", "state2")
    coded = any(isinstance(found.get(name), Tensor) and found[name].dtype == torch.uint8 for name in names)
    wanted = {name: tuple(param.shape) for name in names}
    if coded:
        blocks = -(-param.numel() // adamw.BLOCK)
        wanted |= {"absmax1": (blocks,), "absmax2": (blocks,), "qmap1": (256,), "qmap2": (256,)}
    lacks = [name for name in ("step", *wanted) if name not in found]
    if lacks:
        raise ValueError(f"{what} has {sorted(found)}, expected also {', '.join(lacks)}")
    for name, shape in wanted.items():
        value = found[name]
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{what} has {name} {got}, expected {shape}")
        right = value.dtype == torch.uint8 if coded and name in names else value.is_floating_point()
        if not right:
            raise ValueError(f"{what} has {name} of {value.dtype}, expected {'uint8' if coded else 'floats'}")


def _step(value: Any, what: str) -> int:
    step = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if not isinstance(step, int | float) or not float(step).is_integer() or step < 0:
        raise ValueError(f"{what} has step {value!r}, expected a whole number of at least 0")
    return int(step)


def _converted(found: dict[str, Any], param: Tensor, bits: int) -> Moments:
    """A checkpoint's moments of one parameter in the kind that is kept."""
    if "exp_avg" in found or found["state1"].dtype != torch.uint8:
        keys = ("exp_avg", "exp_avg_sq") if "exp_avg" in found else ("state1", "state2")
        wide = [found[key].detach().cpu().float().reshape(-1).contiguous() for key in keys]
    else:
        kinds = ("state", "absmax", "qmap")
        codes, maxima, maps = ([found[f"{kind}{i}"].cpu().reshape(-1) for i in (1, 2)] for kind in kinds)
        own = adamw.dynamic_map(codes[0].device), adamw.unsigned_map(codes[0].device)
        if bits == 8 and all(torch.equal(theirs, ours) for theirs, ours in zip(maps, own, strict=True)):
            return dict(zip(("codes1", "codes2", "absmax1", "absmax2"), [*codes, *maxima], strict=True))
        wide = [adamw.decode(*parts) for parts in zip(codes, maxima, maps, strict=True)]
    if bits == 32:
        return dict(zip(("exp_avg", "exp_avg_sq"), wide, strict=True))
    made = empty(param, 8)
    for i, moment in enumerate(wide, 1):
        adamw.encode(moment, made[f"codes{i}"], made[f"absmax{i}"], signed=i == 1)
    return made
