"""RMSNorm, RoPE and SwiGLU at 2048 tokens."""

from __future__ import annotations

import pytest

from bench import cases

MAKERS = {"rms_norm": cases.norm, "rope": cases.rotary, "swiglu": cases.activation}


@pytest.mark.parametrize("operator", MAKERS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_elementwise(measure, setup, shape, operator, backward):
    measure(lambda: MAKERS[operator](setup, shape, 2048, backward=backward), operator)
