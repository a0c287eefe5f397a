"""A rank of test_two_ranks_of_fsdp2: a patched model with an adapter, sharded by FSDP2 on the CPU."""

from __future__ import annotations

import os
import sys

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import jindo_core as jc

RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def make():
    torch.manual_seed(0)
    # 67 columns: blocks cross rows; the second layer has 2,211 bytes: uneven shards.
    first, second = nn.Sequential(nn.Linear(64, 67), nn.SiLU()), nn.Sequential(nn.LayerNorm(67), nn.Linear(67, 66))
    model = nn.Sequential(first, second)
    jc.patch_model(model, double_quant=False)
    jc.attach_lora(model, r=4, target_modules="all-linear")
    for module in model.modules():
        if isinstance(module, jc.LoraLinear):
            nn.init.normal_(module.lora_B, std=0.1)
    return model


def gradients(model, x):
    model(x).square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}


def check(policy, tolerance):
    torch.manual_seed(7)
    batch = torch.randn(RANKS * 12, 64)
    wanted = gradients(make(), batch)
    model = make()
    constants = {name: b.clone() for name, b in model.named_buffers() if name.endswith("absmax")}
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    packed = model[0][0].base.weight
    assert isinstance(packed, DTensor)
    assert packed.dtype == torch.uint8
    assert packed.to_local().numel() < packed.numel()
    got = gradients(model, batch[RANK * 12 : (RANK + 1) * 12])
    assert got.keys() == wanted.keys()
    assert len(got) == 4
    for name, gradient in got.items():
        worst = (gradient.float() - wanted[name]).abs().max() / wanted[name].abs().max()
        assert worst < tolerance, f"{name} is off by {worst:.2e}"
    for name, buffer in model.named_buffers():
        if name in constants:
            assert type(buffer) is torch.Tensor
            assert torch.equal(buffer, constants[name])
    assert model[0][0].base.weight.dtype == torch.uint8
    whole = make().state_dict()
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    assert gathered.keys() == whole.keys()
    for name, value in gathered.items():
        assert torch.equal(value, whole[name]), name


def main():
    distributed.init_process_group("gloo", init_method=f"file://{os.environ['STORE']}", rank=RANK, world_size=RANKS)
    check(MixedPrecisionPolicy(), 1e-5)
    check(MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32), 0.05)
    distributed.barrier()  # no rank leaves while another still talks to it
    distributed.destroy_process_group()
    print("as one process")
    sys.stdout.flush()
    os._exit(0)  # as in examples/fsdp2.py: gloo's threads are still running


if __name__ == "__main__":
    main()
