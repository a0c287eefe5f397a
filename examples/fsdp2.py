"""FSDP2: the frozen NF4 bytes are sharded, the maxima stay whole on every rank.

    torchrun --nproc_per_node 2 examples/fsdp2.py
"""

from __future__ import annotations

import os
import sys

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import jindo_core as jc


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (int(distributed.get_world_size()),))
    torch.manual_seed(0)  # the same model on every rank
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(2)))
    jc.patch_model(model.to(device))
    jc.attach_lora(model, r=8, alpha=16, target_modules="all-linear")
    # It casts the adapters, nothing that is NF4 (torch 2.13). torch 2.11 casts the packed bytes too: no policy there.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(distributed.get_rank())  # every rank has rows of its own
    x = torch.randn(64, 64, device=device)
    for step in range(10):
        loss = (model(x).float() - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if distributed.get_rank() == 0 and step % 5 == 4:
            print(f"step {step + 1}  loss {loss.item():.3f}")
    packed = model[0][0].base.weight
    print(f"rank {distributed.get_rank()} holds {packed.to_local().numel():,} of {packed.numel():,} bytes")


if __name__ == "__main__":
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    main()
    distributed.barrier()  # no rank leaves while another still talks to it
    distributed.destroy_process_group()
    # FSDP's caches keep the group, and gloo's threads with it (torch 2.13): Python must not end around running ones.
    sys.stdout.flush()
    os._exit(0)
