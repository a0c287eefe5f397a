"""The same trainer with bitsandbytes' layers and with ours; 512 tokens."""

from __future__ import annotations

import pytest

from bench import fsdp, integrations


@pytest.mark.parametrize("what", integrations.TRAINERS)
def test_trainer_step(measure, setup, model, what):
    make = lambda: integrations.case(what, model, setup.dtype, setup.device, 512)  # noqa: E731
    measure(make, "integrations")


def test_fsdp2_step(measure, setup, model):
    if setup.device.type != "cpu":
        pytest.skip("two ranks on one GPU: NCCL has none")
    measure(lambda: fsdp.case(model, setup.dtype, 512), "integrations")
