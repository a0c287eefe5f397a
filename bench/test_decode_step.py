"""Decoding behind 512 tokens beside transformers + peft + bitsandbytes, the adapter attached and not merged."""

from __future__ import annotations

from bench import steps
from bench.test_training_step import peaks
from bench.timing import OURS


def test_step(measure, setup, model):
    row = measure(lambda: steps.decoding_case(model, setup.dtype, setup.device, 512), "decoding")
    row["peak_mib"] = peaks("decode", [OURS, *row["ratios"]], model, setup, 512)
