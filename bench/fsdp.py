"""A step of two FSDP2 ranks on the CPU, with bitsandbytes' layers and with ours: processes that wait for their turn."""

from __future__ import annotations

import functools
import multiprocessing
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bench import integrations, peers, steps
from bench.shapes import Shape
from bench.timing import OURS, Case

RANKS = 2


def rank(number: int, ours: bool, shape: Shape, dtype: torch.dtype, tokens: int, store: str, line: Connection) -> None:
    """One rank: a step and its loss for each word on the line. torch's AdamW on both sides, for shards are DTensors."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    model = integrations.adapted(shape, steps.random_weights(shape, dtype, torch.device("cpu")), ours=ours)
    layers = [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0)
    torch.manual_seed(number)  # rows of its own
    ids = torch.randint(0, shape.vocab, (1, tokens))
    step = steps.training_step(model, optimizer, ids, Tensor.backward)
    while line.poll(None) and _called(line):
        line.send(step(0).item())


def _called(line: Connection) -> bool:
    """False when the bench has ended, and its end of the line with it."""
    try:
        return bool(line.recv())
    except EOFError:
        return False


def step_call(ours: bool, shape: Shape, dtype: torch.dtype, tokens: int) -> Callable[[int], Tensor]:
    """A step of all ranks, each on rows of its own; returns their losses. They end with this process."""
    context = multiprocessing.get_context("spawn")
    store = str(Path(tempfile.mkdtemp()) / "store")
    lines = []
    for number in range(RANKS):
        near, far = context.Pipe()
        given = (number, ours, shape, dtype, tokens, store, far)
        context.Process(target=rank, args=given, daemon=True).start()
        far.close()  # so that the end of a rank is seen here
        lines.append(near)

    def step(_: int) -> Tensor:
        for line in lines:
            line.send(True)
        return torch.tensor([line.recv() for line in lines])

    return step


def case(shape: Shape, dtype: torch.dtype, tokens: int) -> Case:
    """CPU only: NCCL takes no two ranks on one GPU."""
    calls = {OURS: step_call(True, shape, dtype, tokens)}
    if steps.peers_here(torch.device("cpu")):
        peers.add(calls, "bitsandbytes", functools.partial(step_call, False, shape, dtype, tokens))
    return Case(
        "integrations", "FSDP2, 2 ranks", f"{shape.name} seq {tokens}", RANKS * steps.training_flops(shape, tokens),
        "TFLOP/s", "gemm", calls, rows=tokens, tolerance=steps.LOSSES_AGREE, tokens=RANKS * tokens,
        implementation="whole step",
    )  # fmt: skip
