"""The peak memory of a real training step, measured with no GPU.

Our model, our optimizer, our pager and our operators' fake implementations run on fake *cpu* tensors (shapes without
bytes; the dispatcher told to choose as on CUDA), under a mode that adds up the storages that are alive. What an
operator needs inside itself no mode can see: each declares it (`workspace_bytes` in its contract), and declarations
are held to what the reference really allocates (tests/test_simulation.py). The planner's arithmetic shares nothing
with this but which layers are streamed (`plan.spread`).

    python -m bench.simulation --shape 7b --tokens 512 --lora_r 8 --checkpointed_layers 32

With `--processes N` it is one rank of N: torch's fake process group stands in for the others, and with `--fsdp` the
layers lie in shards that the real fully_shard gathers and frees. `--live` counts the same storages in real steps, of
real ranks under torchrun:

    torchrun --nproc-per-node 2 -m bench.simulation --live --shape 110m --fsdp --device cpu
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from bench.shapes import FALCONS, SHAPES, FalconShape, Shape
from bench.steps import random_weights
from jindo_core import paged_adamw, pager, pages, parallel
from jindo_core.architectures import build
from jindo_core.causal_lm import CausalLM
from jindo_core.head import StreamedHead
from jindo_core.kernels import attention, dispatch, linear_cross_entropy, lora_matmul
from jindo_core.lora import attach_lora
from jindo_core.memory import current_bytes, give_back_freed, peak_bytes
from jindo_core.nf4 import NF4Linear, NF4Weight
from jindo_core.paged_adamw import PagedAdamW
from jindo_core.parallel import ALONE, Ranks
from jindo_core.plan import spread
from jindo_core.recompute import CheckpointOffload
from jindo_core.step import backward
from jindo_core.streaming import LayerStream

ROUNDING = 512
"""Bytes to whose multiples CUDA's caching allocator rounds a block."""


COMPILED = 36 << 20
"""Bytes of the matrix products that oneDNN compiles on a CPU and keeps, one for every shape. Measured (docs/log.md)."""


class Step(NamedTuple):
    """The settings of a training step whose memory is asked for."""

    tokens: int = 512
    micro_batch: int = 1
    lora_r: int = 8
    targets: Sequence[str] | str = "all-linear"
    dropout: float = 0.0
    state_bits: int = 32
    resident_states: bool = True
    checkpointed_layers: int = 0
    offload_checkpoints: bool = False
    offload_layers: int = 0
    offload_embedding: bool = False
    offload_head: bool = False
    accumulation: int = 2
    processes: int = 1
    fsdp: bool = False


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operators make, as long as they live.

    Attributes:
        live, peak, at_start: bytes: now, at most, and of the model alone.
        at_peak: category -> bytes, of what was named, and "other". workspace: of the operator that set the peak.
        scratch: of the dequantized W, which stays once it is made.
    """

    def __init__(self, workspace: Callable[[str, tuple[Any, ...]], tuple[int, int]]) -> None:
        super().__init__()
        self.live = self.peak = self.scratch = self.workspace = self.at_start = 0
        self.at_peak: dict[str, int] = {}
        self._declared = workspace
        self._seen: dict[int, str] = {}
        self._sizes: dict[int, int] = {}
        self._by_category: dict[str, int] = {}

    def name(self, category: str, tensors: Sequence[Tensor]) -> None:
        """Count these tensors' storages, from now on, under a category."""
        for tensor in tensors:
            tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
            self._see(tensor, "other")
            key = tensor.untyped_storage()._cdata
            old, size = self._seen[key], self._sizes[key]
            self._by_category[old] -= size
            self._by_category[category] = self._by_category.get(category, 0) + size
            self._seen[key] = category

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """See what fully_shard gathers: the buffer that comes from all ranks, and the matrices that are copied out of
        it, whose storages it resizes to nothing and back, which is no operator."""

        def allocated(*given: Any, **more: Any) -> Tensor:
            self.name("gathered", [buffer := allocate(*given, **more)])
            return buffer

        def resized(resize: Callable[[Tensor], None], tensor: Tensor) -> None:
            resize(tensor)
            self._resized(tensor)

        allocate = _fsdp_collectives.DefaultAllocMixin.allocate
        with contextlib.ExitStack() as patches:
            patches.enter_context(mock.patch.object(_fsdp_collectives.DefaultAllocMixin, "allocate", allocated))
            for name in ("alloc_storage", "free_storage"):
                run = functools.partial(resized, getattr(_fsdp_param, name))
                patches.enter_context(mock.patch.object(_fsdp_param, name, run))
            yield

    def _resized(self, tensor: Tensor) -> None:
        self.name("gathered", [tensor])
        key = (storage := tensor.untyped_storage())._cdata
        grown = -(-storage.nbytes() // ROUNDING) * ROUNDING - self._sizes[key]
        self._sizes[key] += grown
        self.live += grown
        self._by_category[self._seen[key]] += grown

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            for one in tensor if isinstance(tensor, tuple | list) else (tensor,):
                if isinstance(one, Tensor) and one.device.type != "meta":
                    self._see(one, "other")
        workspace, scratch = self._declared(func.name(), args)
        self.scratch = max(self.scratch, scratch)
        total = self.live + self.scratch + workspace
        if total > self.peak:
            self.peak, self.workspace = total, workspace
            self.at_peak = {k: v for k, v in self._by_category.items() if v}
            self.at_peak |= {"scratch": self.scratch, "workspace": workspace}
        return result

    def _see(self, tensor: Tensor, category: str) -> None:
        if isinstance(tensor, DTensor):  # a wrapper, of the whole's size and without bytes
            tensor = tensor._local_tensor
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = -(-storage.nbytes() // ROUNDING) * ROUNDING
        self._seen[key], self._sizes[key] = category, size
        self.live += size
        self._by_category[category] = self._by_category.get(category, 0) + size
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        size, category = self._sizes.pop(key), self._seen.pop(key)
        self.live -= size
        self._by_category[category] -= size


def cuda_workspace(name: str, args: tuple[Any, ...]) -> tuple[int, int]:
    """(temporaries, scratch of a dequantized W) of one of our operators on CUDA; of torch's, (0, 0)."""
    match name:
        case "jindo::lora_matmul":
            x, widths, lora_A, dropout, keep = args[0], args[5], args[7], args[10], args[12]
            return _lora_workspace(x, x, widths, lora_A, dropout, "lora_matmul", kept=keep)
        case "jindo::lora_matmul_backward":
            dy, widths, in_features, lora_A, kept, dropout = args[0], args[6], args[7], args[9], args[13], args[14]
            x = dy.new_empty(0).expand(*dy.shape[:-1], 0) if args[1] is None else args[1]
            return _lora_workspace(
                dy, x, widths, lora_A, dropout, "lora_matmul_backward", kept=kept is not None, in_features=in_features
            )  # fmt: skip
        case "jindo::linear_cross_entropy":
            hidden, weight = args[:2]
            rows, size = hidden.shape
            held = linear_cross_entropy.workspace_bytes(rows, size, weight.shape[0], hidden.dtype, in_place=True)
            return held, 0
        case "jindo::causal_attention_backward":
            (b, t, h, d), groups, item = args[1].shape, args[2].shape[2], args[1].dtype.itemsize
            return attention.cuda_workspace_bytes(b, t, h, groups, d, item), 0
    return 0, 0


def cpu_workspace(name: str, args: tuple[Any, ...]) -> tuple[int, int]:
    """The same on a CPU, where a chunk of logits lies in the scratch buffer."""
    match name:
        case "jindo::linear_cross_entropy":
            (rows, size), vocab, item = args[0].shape, args[1].shape[0], args[0].dtype.itemsize
            rows = min(rows, linear_cross_entropy.chunk_rows(vocab))
            return 2 * rows * size * item, rows * vocab * item
        case "jindo::causal_attention" | "jindo::causal_attention_backward":
            again = name.endswith("backward")
            q, k = (args[1], args[2]) if again else args[:2]
            (b, t, h, d), groups = q.shape, k.shape[2]
            held = attention.workspace_bytes(b, t, h, groups, d, q.dtype.itemsize, backward=again, window=args[-1])
            return held, 0
    return cuda_workspace(name, args)


def _lora_workspace(
    probe: Tensor, x: Tensor, widths: Sequence[int], lora_A: Sequence[Tensor], dropout: float, operator: str, *,
    kept: bool, in_features: int | None = None,
) -> tuple[int, int]:  # fmt: skip
    in_features = in_features or x.shape[-1]
    rows, again = math.prod(probe.shape[:-1]), operator.endswith("backward")
    width = in_features if again else min(widths)
    if dispatch.choose(operator, probe, rows=rows, width=width) != "reference":
        return 0, 0  # fused: W is never made. (Its D(x) and dY B are a few rows.)
    ranks = [a.shape[0] if a.numel() else 0 for a in lora_A] or [0] * len(widths)
    held = lora_matmul.workspace_bytes(rows, in_features, widths, ranks, probe.dtype, dropout, backward=again)
    return held, 0 if kept else lora_matmul.scratch_bytes(in_features, widths, probe.dtype)


# --- a step on fake tensors -----------------------------------------------------------------------------


class _NoCopies:
    """In place of the pager's thread: there are no bytes to copy."""

    def mark(self) -> None:
        return None

    def copy(self, cuts: Any, before: Any, out: bool) -> Future[None]:
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def wait(self, event: Future[None]) -> None:
        event.result()

    def stalled(self) -> float:
        return 0.0


def _meta_pages(self: pages.PageStore, *place_and_count: Any) -> list[Tensor]:
    count: int = place_and_count[-1]
    return [torch.empty(self.page_bytes, dtype=torch.uint8, device="meta")] * count  # the host's memory, not counted


def _nothing(*_: Any) -> None:
    return None


def _every(labels: Tensor, _: int, __: Tensor | None = None) -> Tensor:
    return torch.arange(len(labels))


def _true(_: Any) -> bool:
    return True


def _zero(_: Tensor) -> float:
    return 0.0


@contextlib.contextmanager
def fake_world(*, cuda: bool = True) -> Iterator[None]:
    """Fake tensors, a pretended GPU, and stores without bytes."""
    with (
        FakeTensorMode(),
        dispatch.pretend_cuda() if cuda else contextlib.nullcontext(),
        mock.patch.object(pager, "_Thread", _NoCopies),
        mock.patch.object(pages.PageStore, "_in_ram", _meta_pages),
        mock.patch.object(pages.PageStore, "_in_file", _meta_pages),
        # Functions, for a Mock remembers its arguments, and so keeps tensors alive.
        mock.patch.object(pager.Pager, "write", _nothing),
        mock.patch.object(linear_cross_entropy, "counted", _every),  # fake labels neither: every row counts
        mock.patch.object(paged_adamw, "_all_finite", _true),  # fake gradients have no values
        mock.patch.object(Tensor, "item", _zero),  # nor has their sum over all ranks
    ):
        yield


@contextlib.contextmanager
def ranks_of(step: Step, *, fake: bool) -> Iterator[Ranks]:
    """This process among `step.processes`: with `fake` it is alone and the others are pretended, else torchrun has
    started them."""
    if step.processes == 1:
        yield ALONE
        return
    if fake:
        distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=step.processes)
    else:
        parallel._meet("cpu", step.processes)
    try:
        ranks = Ranks(distributed.get_rank(), step.processes, sharded=step.fsdp)
        if step.fsdp:
            ranks.mesh  # noqa: B018  # made of real tensors
        yield ranks
    finally:
        distributed.destroy_process_group()


def simulate(
    shape: Shape | FalconShape, step: Step, *, dtype: torch.dtype = torch.bfloat16, steps: int = 2, cuda: bool = True
) -> LiveBytes:
    """Run `steps` real training steps without bytes; the counter tells the peak of all of them, model included.

    Args:
        cuda: as on a GPU; else as on a CPU, where the peak is that of the process's growth plus the model.
    """
    with ranks_of(step, fake=True) as ranks, fake_world(cuda=cuda):
        counter = _count(shape, step, dtype, steps, cuda_workspace if cuda else cpu_workspace, ranks)
    if not cuda:
        counter.peak += COMPILED
    return counter


def live(
    shape: Shape | FalconShape, step: Step, *, dtype: torch.dtype = torch.bfloat16, steps: int = 2
) -> LiveBytes:
    """The same count of real steps on this CPU, without what oneDNN compiles."""
    with ranks_of(step, fake=False) as ranks:
        return _count(shape, step, dtype, steps, cpu_workspace, ranks)


def _count(
    shape: Shape | FalconShape, step: Step, dtype: torch.dtype, steps: int,
    workspace: Callable[[str, tuple[Any, ...]], tuple[int, int]], ranks: Ranks,
) -> LiveBytes:  # fmt: skip
    counter = LiveBytes(workspace)
    with counter, counter.watching():
        model = _build(shape, step, dtype, ranks)
        _name(counter, model)
        counter.at_start, counter.peak = counter.live, 0
        optimizer = _optimizer(model, step)
        for _ in range(steps):
            _train(model, optimizer, step, counter, ranks)
            counter.name("optimizer", _buffers(optimizer))
    return counter


def measure(shape: Shape | FalconShape, step: Step, *, dtype: torch.dtype = torch.bfloat16, steps: int = 2) -> int:
    """Bytes by which this process's resident memory grows in real steps on the CPU, from the loaded model on.

    The C allocator must give freed blocks back for that (MALLOC_MMAP_THRESHOLD_=65536 in the environment, from the
    process's start); by default glibc keeps those under 32 MB, and the figure tells its habits.
    """
    warm, small = Shape("warm", 64, 128, 2, 4, 2, 256), step._replace(tokens=8, checkpointed_layers=0)
    model = _build(warm, small, dtype)
    _train(model, _optimizer(model, small), small)  # libraries, threads
    model = _build(shape, step, dtype)
    optimizer = _optimizer(model, step)
    give_back_freed()
    before = current_bytes(torch.device("cpu"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak from now on
    for _ in range(steps):
        _train(model, optimizer, step)
    return peak_bytes(torch.device("cpu")) - before


def _optimizer(model: CausalLM, step: Step) -> PagedAdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    return PagedAdamW(
        trained, state_bits=step.state_bits, resident_bytes=1 << 60 if step.resident_states else 0
    )  # fmt: skip


def _train(
    model: CausalLM, optimizer: PagedAdamW, step: Step, counter: LiveBytes | None = None, ranks: Ranks = ALONE
) -> None:
    """One step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    ids = torch.zeros(step.micro_batch, step.tokens, dtype=torch.int64)
    for _ in range(step.accumulation):
        loss = model(ids, labels=ids).loss
        assert loss is not None
        backward(loss)
        del loss
        if counter is not None:
            counter.name("gradients", [p.grad for p in trained if p.grad is not None])
    ranks.sum_gradients(trained, torch.zeros((), device=trained[0].device))
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _build(shape: Shape | FalconShape, step: Step, dtype: torch.dtype, ranks: Ranks = ALONE) -> CausalLM:
    weights = dict(random_weights(shape, dtype, torch.device("cpu")))
    with torch.device("meta"):
        model = build(shape.config())
    stack = model.stack
    for name in list(weights):
        weight = weights.pop(name)  # whole only until its layer lies in shards
        path, _, leaf = name.rpartition(".")
        if isinstance(weight, NF4Weight):
            parent, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent), attribute, NF4Linear(weight))
        elif step.offload_embedding and name == f"{model.EMBEDDING}.weight":
            held = nn.Parameter(weight.to("meta"), requires_grad=False)  # the host's
            stack.embedding.weight = held
        else:
            setattr(model.get_submodule(path), leaf, nn.Parameter(weight, requires_grad=False))
    if model.config.tie_word_embeddings:
        model.lm_head.weight = stack.embedding.weight
    del weight
    for layer in stack.layers:
        ranks.shard(layer)
    attach_lora(model, step.lora_r, 16, step.dropout, step.targets)
    ranks.shard_root(stack)
    stack.checkpointed_layers = step.checkpointed_layers
    if step.offload_checkpoints:
        stack.checkpoint_offload = CheckpointOffload()
    if step.offload_head:
        model.lm_head = StreamedHead(model.lm_head.weight, torch.device("cpu"))
    if step.offload_layers:
        stack.stream = LayerStream(torch.device("cpu"))
        for number in spread(step.offload_layers, len(stack.layers)):
            stack.stream.take(number, stack.layers[number])
    return model.train()


def _name(counter: LiveBytes, model: CausalLM) -> None:
    stack = model.stack
    linears = [m for m in model.modules() if isinstance(m, NF4Linear)]
    real = [m for m in linears if not m.weight.is_meta]
    counter.name("weights", [m.weight for m in real])
    counter.name("constants", [b for m in real for b in m.buffers() if b is not None])
    counter.name("adapters", [p for p in model.parameters() if p.requires_grad])
    if not model.lm_head.weight.is_meta:
        counter.name("head", [model.lm_head.weight])
    if not stack.embedding.weight.is_meta:
        counter.name("embedding", [stack.embedding.weight])


def _buffers(optimizer: PagedAdamW) -> list[Tensor]:
    found = []
    for own in optimizer._pagers.values():
        found += own._resident + [slot.buffer for slot in own._slots if slot.buffer is not None]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.simulation", allow_abbrev=False)
    parser.add_argument("--shape", default="7b", choices=[*SHAPES, *FALCONS])
    for name, default in Step._field_defaults.items():
        if isinstance(default, bool):
            parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=default)
        else:
            parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--measure", action="store_true", help="real steps on this CPU: how much the process grows")
    how.add_argument("--live", action="store_true", help="real steps on this CPU, under torchrun: storages counted")
    given = vars(parser.parse_args())
    shape, device = (SHAPES | FALCONS)[given.pop("shape")], given.pop("device")
    real, counted = given.pop("measure"), given.pop("live")
    if counted:
        given["processes"] = int(os.environ.get("WORLD_SIZE", "1"))
    step = Step(**given)
    if real:
        print(measure(shape, step))
        return
    found = live(shape, step) if counted else simulate(shape, step, cuda=device == "cuda")
    for category, size in sorted(found.at_peak.items(), key=lambda item: -item[1]):
        print(f"{category:12} {size / 1e6:12,.1f} MB")
    print(f"{'peak':12} {found.peak / 1e6:12,.1f} MB (1e6 bytes), no CUDA context, no fragmentation")


if __name__ == "__main__":
    main()
