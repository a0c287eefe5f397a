"""A checkpoint's adapter and moments as a torch.distributed.checkpoint, and back; any number of processes each way.

    torchrun --nproc_per_node 2 examples/dcp.py save ./out/checkpoint-200 ./dcp-200
    torchrun --nproc_per_node 3 examples/dcp.py load ./dcp-200 ./back
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

FILES = ("adapter_model.safetensors", "optimizer.safetensors")


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All of a checkpoint, named file/tensor: LoRA's A and B, and of each its moments (with scales, where 8-bit)."""
    for file in FILES:
        with safe_open(folder / file, "pt") as found:
            for name in found.keys():  # noqa: SIM118  # no mapping
                yield f"{file}/{name}", found.get_tensor(name)


def save(source: Path, target: Path, mesh: DeviceMesh) -> None:
    """Each process writes its rows of every tensor."""
    if distributed.get_rank() == 0:
        # Never into a folder that was used: torn, it would load new rows under the old metadata, without a word.
        target.mkdir()
    distributed.barrier()
    state = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in tensors(source)}
    dcp.save(state, checkpoint_id=str(target))


def load(source: Path, target: Path, mesh: DeviceMesh) -> None:
    """Each process reads its rows, however many wrote them; then the first one writes the two files again."""
    described = dcp.FileSystemReader(str(source)).read_metadata().state_dict_metadata
    state = {
        name: distribute_tensor(torch.empty(found.size, dtype=found.properties.dtype), mesh, [Shard(0)])
        for name, found in described.items()
    }
    dcp.load(state, checkpoint_id=str(source))
    whole = {name: value.full_tensor() for name, value in state.items() if isinstance(value, DTensor)}
    if distributed.get_rank() == 0:
        target.mkdir()
        for file in FILES:
            parts = {n.partition("/")[2]: value for n, value in whole.items() if n.startswith(f"{file}/")}
            save_file(parts, target / file)
        print(f"{len(whole)} tensors in {target}")


def main(what: str, source: str, target: str) -> None:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    {"save": save, "load": load}[what](Path(source), Path(target), mesh)


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    main(*sys.argv[1:])
    distributed.barrier()
    distributed.destroy_process_group()
