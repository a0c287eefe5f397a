"""Several processes that train one model together, each on its part of every step's rows; one process is `ALONE`.

`torchrun` starts them. All hold the same adapter and make the same updates: gradients are summed in one flat bucket
a step, divided by the supervised tokens of all ranks. With `--fsdp` each holds its share of the frozen weights only
(torch's fully_shard); adapter, moments, NF4's constants and what is not quantized stay whole everywhere.

What may fail on one rank alone (memory, a signal, a disk) is agreed on by all before anything is done about it. The
first rank writes, logs and draws. Flags and objects go by gloo, also beside a GPU, so that none waits for the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from jindo_core.config import TrainConfig
from jindo_core.errors import InputError, Stopped, TrainingError
from jindo_core.nf4 import NF4Weight

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others at a meeting. One that died is noticed at once; one that hangs, by this."""

GRACE = 1.0
"""Seconds that a rank which leaves what is to be said to another stays: torchrun ends all when the first has gone."""

ALONE_LIMIT = timedelta(minutes=30)
"""How long the others wait for what the first rank does by itself, a checkpoint's writing say. What may take any time
has no limit: rows that are tokenized, predictions, the end of the run."""

_POLL = 0.05
_FAILED = "failed"
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_MEETINGS = itertools.count()
"""Of this process: each has words of its own in the store."""

T = TypeVar("T")


class Ranks:
    """The processes of a run, and this one's place among them. With one process every method is a no-op.

    All ranks must call what meets the others (marked *) in the same order.

    Attributes:
        rank: this one. size: how many there are. local: this one among its machine's. sharded: see `shard`.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, local: int = 0, *, store: distributed.Store | None = None,
        device: str = "cpu", sharded: bool = False,
    ) -> None:  # fmt: skip
        self.rank, self.size, self.local, self.sharded = rank, size, local, sharded
        self._store, self._device, self._turns = store, device, itertools.count()

    @property
    def leads(self) -> bool:
        """Whether this rank writes, logs and draws."""
        return self.rank == 0

    @property
    def beside(self) -> int:
        """How many of the ranks run on this machine, this one included."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.size > 1 else 1

    # --- agreeing -----------------------------------------------------------------------------------------

    def worst(self, value: int) -> int:
        """* The largest of all ranks' values."""
        if self.size == 1:
            return value
        found = torch.tensor(value)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return int(found)

    def totals(self, *values: float) -> tuple[float, ...]:
        """* The sums over all ranks, in fp64."""
        if self.size == 1:
            return values
        found = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(found)
        return tuple(found.tolist())

    def gather(self, value: T) -> list[T]:
        """* Every rank's value, in their order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value)
        return found

    def check_same(self, found: Mapping[str, Any]) -> None:
        """* See that all ranks have the same. TrainingError names what differs, by its key."""
        if self.size == 1:
            return
        first, *others = self.gather(dict(found))
        for rank, theirs in enumerate(others, 1):
            for name, value in first.items():
                if theirs[name] != value:
                    raise TrainingError(f"{name} of rank {rank} differ from rank 0's: give all ranks the same")

    def first(self, run: Callable[[], T], *, limit: timedelta | None = ALONE_LIMIT) -> T:
        """* run() on the first rank, whose result or failure (OSError, InputError, TrainingError) is everybody's.

        Args:
            limit: how long the others wait for it; None: however long it takes.
        Raises:
            TrainingError: it took longer.
        """
        if self.size == 1:
            return run()
        assert self._store is not None
        key = f"first/{next(self._turns)}"
        if self.leads:
            try:
                said = (run(), None)
            except (OSError, InputError, TrainingError) as error:
                self._put(key, pickle.dumps((None, error)))
                raise
            self._put(key, pickle.dumps(said))
            return said[0]
        self._wait(key, limit)
        value, failure = pickle.loads(self._store.get(key))
        if failure is not None:
            raise failure
        return value

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """* The first rank of each machine goes through the block before the others: what it downloads or tokenizes
        is there for them."""
        if self.size == 1:
            yield
            return
        key = f"turn/{next(self._turns)}/{os.environ.get('GROUP_RANK', '0')}"
        if self.local:
            self._wait(key)
        try:
            yield
        finally:  # where it failed the others find out for themselves
            if not self.local:
                self._put(key, b"1")

    def _put(self, key: str, value: bytes) -> None:
        assert self._store is not None
        self._store.set(key, value)  # type: ignore[arg-type]  # which is what it takes besides str

    def tell(self, error: InputError | TrainingError) -> None:
        """Why this rank ends, for those who wait for it if it is the first."""
        if self.leads:
            self._put(_FAILED, pickle.dumps(error))

    def _wait(self, key: str, limit: timedelta | None = None) -> None:
        assert self._store is not None
        began = time.monotonic()
        while not self._store.check([key]):
            if self._store.check([_FAILED]):
                raise pickle.loads(self._store.get(_FAILED))
            if limit is not None and time.monotonic() - began > limit.total_seconds():
                raise TrainingError(
                    f"rank {self.rank} has waited {limit.total_seconds() / 60:.0f} minutes for rank 0, which hangs or "
                    "whose disk does: all stop; --resume goes on from the newest checkpoint"
                )
            time.sleep(_POLL)

    def says(self, text: str) -> bool:
        """Whether it is this rank that tells the user; of equal texts the first does."""
        if self._store is None:
            return True
        return self._store.add(f"said/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1

    # --- a step -------------------------------------------------------------------------------------------

    def share(self, batches: Sequence[list[int]], most: int, length_of: Callable[[int], int]) -> list[list[int]]:
        """This rank's part of a step's micro-batches, none with more than `most` rows: each row is one rank's, and
        padded tokens are spread evenly. With `sharded` all ranks have as many: an empty one makes up for it.

        Args:
            length_of: tokens of a row, by its number.
        """
        if self.size == 1:
            return cut(batches, most)
        rows = sum(map(len, batches))
        pieces = cut(batches, most)
        while len(pieces) < min(self.size, rows):  # or a rank would be idle
            most = min(most, max(map(len, pieces))) - 1
            pieces = cut(batches, most)
        costs = [len(piece) * max(map(length_of, piece)) for piece in pieces]
        shares: list[list[list[int]]] = [[] for _ in range(self.size)]
        loads = [0] * self.size
        for number in sorted(range(len(pieces)), key=lambda n: (-costs[n], n)):  # the largest first, to the idlest
            idlest = loads.index(min(loads))
            shares[idlest].append(pieces[number])
            loads[idlest] += costs[number]
        return self._padded(shares)

    def deal(self, batches: Sequence[list[int]]) -> list[list[int]]:
        """This rank's part of batches whose order does not matter; padded as in `share`."""
        return self._padded([list(batches[rank :: self.size]) for rank in range(self.size)])

    def _padded(self, shares: list[list[list[int]]]) -> list[list[int]]:
        own = shares[self.rank]
        return own + [[]] * (max(map(len, shares)) - len(own)) if self.sharded else own

    def sum_gradients(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """* Sum all ranks' gradients in place, and their losses, scalars: one all-reduce, which the host does not wait
        for on a GPU. A rank without rows adds zeros."""
        if self.size == 1:
            return loss
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad.detach() for parameter in parameters if parameter.grad is not None]
        bucket = torch.cat([gradient.view(-1) for gradient in gradients] + [loss.to(gradients[0]).view(1)])
        distributed.all_reduce(bucket)
        parts = bucket[:-1].split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return bucket[-1]

    # --- weights ------------------------------------------------------------------------------------------

    def same_constants(self, weight: NF4Weight) -> NF4Weight:
        """* The weight with the first rank's constants: the last bit of their offset depends on the number of
        threads."""
        if self.size == 1 or weight.nested_absmax is None or weight.offset is None:
            return weight  # plain maxima have no sums in them
        for part in (weight.absmax, weight.nested_absmax, weight.offset):
            distributed.broadcast(part, 0)
        return weight

    def same_adapter(self, model: nn.Module) -> None:
        """* Give every rank the first one's adapter."""
        if self.size > 1:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    distributed.broadcast(parameter.detach(), 0)

    def diverge(self, seed: int, step: int = 0) -> None:
        """Let this rank draw its own dropout; the first one's generators stay as they are."""
        if not self.leads:
            mixed = hashlib.sha256(f"{seed} {self.rank} {step}".encode()).digest()
            torch.manual_seed(int.from_bytes(mixed[:4], "little"))

    def shard(self, layer: nn.Module) -> None:
        """* Keep this rank's part of a frozen layer's matrices; whole they are there while the layer runs."""
        if self.sharded:
            self._fully_shard(layer, ignored={p for p in layer.parameters() if p.ndim < 2})

    def shard_root(self, stack: nn.Module) -> None:
        """* Tie the sharded layers of a stack together, once its adapter is attached."""
        if self.sharded:
            self._fully_shard(stack, ignored={p for p in stack.parameters() if not isinstance(p, _sharded_type())})

    @functools.cached_property
    def mesh(self) -> DeviceMesh:
        """* All ranks in a row, as fully_shard takes them."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self._device, (self.size,))

    def _fully_shard(self, module: nn.Module, ignored: set[nn.Parameter]) -> None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(module, mesh=self.mesh, reshard_after_forward=True, ignored_params=ignored)


def _sharded_type() -> type:
    from torch.distributed.tensor import DTensor

    return DTensor


ALONE = Ranks()


@contextlib.contextmanager
def whole(layer: nn.Module) -> Iterator[None]:
    """* A sharded layer has all of its weights inside; any other has them anyway.

    Nothing may hold them as numpy's: their memory is freed behind the block.
    """
    if not is_sharded(layer):
        yield
        return
    layer.unshard()  # type: ignore[operator]
    try:
        yield
    finally:
        layer.reshard()  # type: ignore[operator]


def is_sharded(layer: nn.Module) -> bool:
    """Whether `Ranks.shard` had it."""
    return hasattr(layer, "unshard")


def cut(batches: Sequence[list[int]], most: int) -> list[list[int]]:
    """The same rows in micro-batches of at most `most`."""
    return [batch[i : i + most] for batch in batches for i in range(0, len(batch), most)]


# --- meeting and parting ----------------------------------------------------------------------------------


@contextlib.contextmanager
def joined(config: TrainConfig) -> Iterator[tuple[Ranks, TrainConfig]]:
    """The processes that torchrun started, or this one alone; and the settings with this one's device.

    What ends all of them is said once; a rank that leaves it to another raises SystemExit with the same code.

    Raises:
        InputError: settings that don't go with the number of processes, or half of torchrun's variables.
        TrainingError: another rank is gone, or hangs.
    """
    size = _world_size()
    _check(config, size)
    if size == 1:
        yield ALONE, config
        return
    local = int(os.environ["LOCAL_RANK"])
    config = _on_device_of(config, local)
    device = config.device.partition(":")[0]
    store = _meet(device, size)
    ranks = Ranks(int(os.environ["RANK"]), size, local, store=store, device=device, sharded=config.fsdp)
    try:
        yield ranks, config
        ranks.first(lambda: None, limit=None)  # it answers, saves and draws alone, and a meeting has a limit
        distributed.barrier()  # whoever leaves earlier takes the connection along
    except (InputError, TrainingError, Stopped) as error:
        distributed.destroy_process_group()
        _say_once(ranks, error)
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        lost = TrainingError(
            "another process of this run is gone or does not answer: all stop; --resume goes on from the newest "
            "checkpoint"
        )
        lost.__cause__ = error
        _say_once(ranks, lost)
    distributed.destroy_process_group()


def _say_once(ranks: Ranks, error: InputError | TrainingError | Stopped) -> None:
    try:
        if not isinstance(error, Stopped):  # which all ranks come to together
            ranks.tell(error)
        says = ranks.says(str(error))
    except RuntimeError as gone:  # the store, with the process that held it
        if not _is_lost(gone):
            raise
        says = True
    if says:
        raise error
    time.sleep(GRACE)
    raise SystemExit(error.code if isinstance(error, Stopped) else 1 if isinstance(error, TrainingError) else 2)


def _is_lost(error: RuntimeError) -> bool:
    """gloo has no exception of its own, but its messages name its source."""
    return isinstance(error, distributed.DistError) or "gloo" in str(error)


def _world_size() -> int:
    """As torchrun's variables say."""
    given = os.environ.get("WORLD_SIZE", "1")
    if not given.isdecimal() or int(given) < 1:
        raise InputError(f"WORLD_SIZE is {given!r}, expected a number of processes: start them with torchrun")
    if int(given) > 1 and (missing := [name for name in _VARIABLES if name not in os.environ]):
        raise InputError(
            f"WORLD_SIZE is {given}, and {missing[0]} is missing: expected all of torchrun's variables; start with "
            f"torchrun --nproc-per-node {given} -m jindo_core train …"
        )
    return int(given)


def require_alone(command: str) -> None:
    """See that torchrun did not start several of what runs as one. Raises InputError."""
    if (size := _world_size()) > 1:
        raise InputError(f"{command}: got {size} processes, expected one: start it without torchrun")


def _check(config: TrainConfig, size: int) -> None:
    if size == 1:
        if config.fsdp:
            raise InputError(
                "--fsdp: got it in one process, expected several: torchrun --nproc-per-node N -m jindo_core train …"
            )
        return
    if ":" in config.device:
        raise InputError(f"--device: got {config.device} for {size} processes, expected cuda: each takes its own")
    if not config.fsdp:
        return
    if config.offload_layers:
        raise InputError("--offload_layers: got it beside --fsdp, expected one of them: layers lie in shards then")
    if config.predict_with_generate:
        raise InputError(
            "--predict_with_generate: got it beside --fsdp, whose ranks can't answer alone: leave it out, and answer "
            "afterwards with jindo-core eval --tasks generation"
        )


def _on_device_of(config: TrainConfig, local: int) -> TrainConfig:
    """Each process of a machine takes a GPU of its own."""
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return dataclasses.replace(config, device="cpu")
    here, count = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1)), torch.cuda.device_count()
    if here > count:
        raise InputError(f"got {here} processes for {count} GPUs, expected one for each: --nproc-per-node {count}")
    torch.cuda.set_device(local)
    return dataclasses.replace(config, device=f"cuda:{local}")


def _meet(device: str, size: int) -> distributed.Store:
    """Make the process group; returns a store for words between the ranks."""
    from torch.distributed.rendezvous import rendezvous

    if distributed.is_initialized():
        raise InputError("torch.distributed has a process group already: training makes its own, leave that to it")
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    store = distributed.PrefixStore(f"meeting/{next(_MEETINGS)}", store)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", store=distributed.PrefixStore("group", store), rank=rank,
        world_size=size, timeout=TIMEOUT,
    )  # fmt: skip
    return distributed.PrefixStore("words", store)


def advice(config: TrainConfig) -> str | None:
    """What a single process should know of the GPUs that it leaves idle."""
    count = torch.cuda.device_count() if config.device in ("auto", "cuda") else 1
    if count < 2:
        return None
    return (
        f"{count} GPUs are visible and one is used: torchrun --nproc-per-node {count} -m jindo_core train … trains on "
        "all of them"
    )
