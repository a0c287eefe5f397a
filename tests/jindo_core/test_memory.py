"""The memory plan against what a step really keeps."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from jindo_core.loader import load_model
from jindo_core.lora import attach_lora
from jindo_core.memory import activation_bytes, peak_bytes, plan_training


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_activations_are_what_autograd_saves(stories15m, dtype):
    model = attach_lora(load_model(stories15m, dtype=dtype, device="cpu"), r=8, target_modules="all-linear").train()
    ids = torch.randint(0, 32000, (4, 64))
    saved: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.model(ids)
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept = sum(size for pointer, size in saved.items() if pointer not in weights)
    planned = model.config.num_hidden_layers * activation_bytes(model.config, ids.numel(), model.dtype.itemsize)
    assert hidden.requires_grad
    assert planned == pytest.approx(kept, rel=0.15)


def test_the_plan_counts_every_weight_once(stories260k):
    model = attach_lora(load_model(stories260k, dtype="fp32", device="cpu"), r=4)
    plan = plan_training(model, rows=2, length=32, gradient_checkpointing=False)
    rows = dict(plan.rows)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad) * 4
    assert rows["adapter (fp32)"] == trainable
    assert rows["AdamW states (fp32)"] == 2 * trainable
    # tied: the embedding is the head
    assert rows["embedding, norms, head (fp32)"] == 4 * (512 * 64 + 11 * 64)
    assert plan.total == sum(rows.values())
    smaller = plan_training(model, rows=2, length=32, gradient_checkpointing=True)
    assert smaller.total < plan.total


def test_the_peak_is_this_process_s_own():
    """A process started by a large one does not report the large one's peak."""
    ballast = torch.ones(100 << 20)  # 400 MiB
    code = "import torch; from jindo_core.memory import peak_bytes; print(peak_bytes(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own = peak_bytes(torch.device("cpu"))
    assert own >= ballast.nbytes
    assert int(done.stdout) <= own - ballast.nbytes // 2
