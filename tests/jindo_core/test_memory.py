"""The memory plan against what a step really keeps, and what gives way."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

from jindo_core.config import TrainConfig
from jindo_core.errors import InputError
from jindo_core.loader import load_model
from jindo_core.lora import attach_lora
from jindo_core.memory import Relief, is_out_of_memory, job_of, peak_bytes, sizes_of, within_budget
from jindo_core.paged_adamw import PagedAdamW
from jindo_core.plan import LINEARS, SHAPES, kept_by_a_layer, plan


def config(**given):
    return TrainConfig(lora_target_modules=("all-linear",), lora_dropout=0.0, **given)


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "v_proj"), ("down_proj",)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_activations_are_what_autograd_saves(stories15m, dtype, targets):
    model = load_model(stories15m, dtype=dtype, device="cpu")
    attach_lora(model, r=8, target_modules=targets).train()
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
    names = LINEARS if targets == ("all-linear",) else targets
    job = job_of(config(), sizes_of(model.config), length=64, itemsize=model.dtype.itemsize, context=0)
    job = dataclasses.replace(job, targets=names, micro_batch=4)
    planned = plan(job).rows["activations"]
    assert model.config.num_hidden_layers * kept_by_a_layer(job) >= planned
    assert hidden.requires_grad
    assert planned == pytest.approx(kept, rel=0.03)


def test_the_plan_counts_every_weight_once(stories260k):
    model = attach_lora(load_model(stories260k, dtype="fp32", device="cpu"), r=4)
    given = TrainConfig(lora_r=4, micro_batch_size=2)
    job = job_of(given, sizes_of(model.config), length=32, itemsize=4, context=0)
    rows = plan(job).rows
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad) * 4
    assert rows["adapters"] == rows["gradients"] == trainable
    packed = [m for m in model.modules() if hasattr(m, "nf4")]
    assert rows["weights"] == sum(m.weight.nbytes for m in packed)
    assert rows["constants"] == sum(m.nf4.nbytes - m.weight.nbytes for m in packed)
    # tied: the embedding is the head
    assert (rows["embedding"], rows["head"], rows["norms"]) == (4 * 512 * 64, 0, 4 * 11 * 64)


def test_the_peak_is_this_process_s_own():
    """A process started by a large one does not report the large one's peak."""
    ballast = torch.ones(100 << 20)  # 400 MiB
    code = "import torch; from jindo_core.memory import peak_bytes; print(peak_bytes(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own = peak_bytes(torch.device("cpu"))
    assert own >= ballast.nbytes
    assert int(done.stdout) <= own - ballast.nbytes // 2


def test_a_budget_changes_the_settings_and_not_the_step():
    given = config(max_memory_MB=5400, batch_size=7, micro_batch_size=4, cutoff_len=512)
    job = job_of(given, SHAPES["llama2-7b"], length=512, itemsize=2, context=500_000_000)
    chosen, found, changes = within_budget(given, job)
    assert plan(found).peak_bytes <= 5.4e9
    assert changes
    assert chosen.micro_batch_size * chosen.accumulation_steps == 4, "as 7 // 4 micro-batches of 4"
    assert within_budget(config(), job)[2] == []


def test_a_budget_for_torch_s_optimizer_does_not_page():
    given = config(max_memory_MB=7000, optim="adamw_torch", micro_batch_size=1)
    job = job_of(given, SHAPES["llama2-7b"], length=512, itemsize=2, context=500_000_000)
    chosen, found, _ = within_budget(given, job)
    assert found.resident_states is None
    assert chosen.checkpointed_layers > 0
    given = config(max_memory_MB=2500, optim="adamw_torch", lora_r=64)
    job = job_of(given, SHAPES["llama2-7b"], length=256, itemsize=2, context=500_000_000)
    with pytest.raises(InputError, match=r"got 2500, but .* or take --optim paged_adamw_32bit"):
        within_budget(given, job)


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"))
    assert not is_out_of_memory(RuntimeError("shapes"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value), "as this torch says it"


@pytest.mark.parametrize("streamed", [0, 2])
def test_relief_ends(stories260k, streamed):
    model = load_model(stories260k, dtype="fp32", device="cpu", offload_layers=streamed)
    attach_lora(model, r=4).train()
    optimizer = PagedAdamW([p for p in model.parameters() if p.requires_grad])
    relief = Relief(model, optimizer, 2)
    said = []
    while (done := relief.give_way()) is not None:
        said.append(done)
    # a smaller micro-batch, checkpointing, checkpoints to the host; then two of the five layers at a time
    assert len(said) == 3 + {0: 3, 2: 2}[streamed], said
    assert relief.micro_batch == 1
    assert len(model.model.stream.layers) == model.config.num_hidden_layers
    ids = torch.arange(3, 12)[None]
    model(ids, labels=ids).loss.backward()
