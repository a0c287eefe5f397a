"""Memory of a run: what it is planned to take, what it takes, and what gives way when there is too little."""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from jindo_core.budget import Change, fit
from jindo_core.causal_lm import CausalLM, ModelConfig
from jindo_core.config import PROFILES, TrainConfig
from jindo_core.errors import InputError, TrainingError
from jindo_core.falcon import FalconConfig
from jindo_core.head import StreamedHead
from jindo_core.interrupt import Broken
from jindo_core.model import LlamaConfig
from jindo_core.nf4 import NF4Linear
from jindo_core.paged_adamw import PagedAdamW
from jindo_core.parallel import ALONE, Ranks
from jindo_core.plan import CONTEXT, Job, Sizes, plan, spread
from jindo_core.plan_falcon import FalconSizes
from jindo_core.recompute import CheckpointOffload, random_state, set_random_state
from jindo_core.streaming import LayerStream

CUDA_CONTEXT = CONTEXT

CPU_PRODUCTS = 36 << 20
"""Bytes that a CPU's process grows by beside its tensors: matrix products that oneDNN compiles, one for every shape."""

_WELL, _SHORT, _BROKEN = range(3)
"""How a try ended; of several ranks the worst counts."""

T = TypeVar("T")
R = TypeVar("R")


def sizes_of(config: ModelConfig) -> Sizes | FalconSizes:
    """A model's numbers as the planner takes them."""
    if isinstance(config, FalconConfig):
        return FalconSizes(
            config.hidden_size, config.ffn_hidden_size, config.num_hidden_layers, config.num_attention_heads,
            config.num_key_value_heads, config.head_dim, config.vocab_size, config.norms, config.tie_word_embeddings,
            config.bias,
        )  # fmt: skip
    assert isinstance(config, LlamaConfig)
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    biases = config.attention_bias * heads * config.head_dim + config.output_bias * config.hidden_size
    biases += config.mlp_bias * (2 * config.intermediate_size + config.hidden_size)
    return Sizes(
        config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads,
        config.num_key_value_heads, config.head_dim, config.vocab_size, config.tie_word_embeddings,
        biases, config.attention_bias,
    )  # fmt: skip


def usual_targets(config: TrainConfig, named: bool, sizes: Sizes | FalconSizes) -> TrainConfig:
    """The settings with the family's usual layers to adapt, where the profile's are another family's.

    Args:
        named: whether the user gave --lora_target_modules, which then stays as it is.
    """
    names = config.lora_target_modules
    if named or names != PROFILES["alpaca"]["lora_target_modules"] or any(n in sizes.linears for n in names):
        return config
    return dataclasses.replace(config, lora_target_modules=sizes.usual_targets)


def job_of(
    config: TrainConfig, sizes: Sizes | FalconSizes, *, length: int, itemsize: int, context: int, processes: int = 1
) -> Job:
    """A training run's step, as the planner takes it; with several processes, one's part of it.

    Args:
        length: tokens of the longest sequence. itemsize: bytes of an activation's element.
        context: bytes that the process holds beside the step.
        processes: how many share a step's rows, and with `fsdp` the layers' matrices.
    """
    names = config.lora_target_modules
    known = tuple(sizes.linears)
    targets = known if names == ("all-linear",) else tuple(n for n in known if any(x.endswith(n) for x in names))
    for name in ("checkpointed_layers", "offload_layers"):
        if getattr(config, name) > sizes.layers:
            raise InputError(
                f"--{name}: got {getattr(config, name)}, expected at most {sizes.layers}, the model's layers"
            )
    layers = sizes.layers if config.gradient_checkpointing else config.checkpointed_layers
    paged = config.optim != "adamw_torch"
    resident = config.resident_optimizer_MB if paged else None
    return Job(
        sizes=sizes, length=length, micro_batch=config.micro_batch_size,
        accumulation=-(-config.accumulation_steps // processes),
        lora_r=config.lora_r, targets=targets, dropout=config.lora_dropout, itemsize=itemsize,
        quantized=config.quantize == "nf4", double_quant=config.double_quant,
        state_bits=8 if config.optim == "paged_adamw_8bit" else 32, paged=paged,
        checkpointed_layers=layers, offload_checkpoints=config.offload_checkpoints,
        offload_embedding=config.offload_embedding, offload_head=config.offload_head,
        offload_layers=config.offload_layers, context=context, packed=config.packing,
        resident_states=None if resident is None else resident * 1_000_000, processes=processes, sharded=config.fsdp,
    )  # fmt: skip


def within_budget(config: TrainConfig, job: Job, *, exact: bool = False) -> tuple[TrainConfig, Job, list[Change]]:
    """The settings with what --max_memory_MB makes necessary, and what that is.

    Args:
        exact: for the rest of a run, which is to end as it would have: only what changes no bit.
    Raises:
        InputError: no settings keep the budget.
    """
    if not config.max_memory_MB:
        return config, job, []
    budget = config.max_memory_MB * 1_000_000
    found, changes, fits = fit(job, budget, exact=exact)
    if not fits and exact:
        least = plan(found).peak_bytes / 1e6
        raise InputError(
            f"--max_memory_MB: got {config.max_memory_MB}, but the rest of this run takes {least:,.0f} MB with all "
            "offloaded that changes no bit of it: its micro_batch_size and offload_head can't change on the way; "
            "raise it, or begin anew in another --output_dir"
        )
    if not fits:
        least = plan(found).peak_bytes / 1e6
        more = "" if job.paged else ", or take --optim paged_adamw_32bit"
        more += ", or share the layers among more processes" if job.sharded else ""
        raise InputError(
            f"--max_memory_MB: got {config.max_memory_MB}, but with everything offloaded a step of "
            f"{found.length} tokens still takes {least:,.0f} MB: raise it, or lower --cutoff_len{more}"
        )
    resident = found.resident_states
    chosen = dataclasses.replace(
        config, micro_batch_size=found.micro_batch, batch_size=config.micro_batch_size * config.accumulation_steps,
        gradient_checkpointing=found.checkpointed_layers >= found.sizes.layers,
        checkpointed_layers=found.checkpointed_layers, offload_checkpoints=found.offload_checkpoints,
        offload_embedding=found.offload_embedding, offload_head=found.offload_head, offload_layers=found.offload_layers,
        resident_optimizer_MB=None if resident is None else -(-resident // 1_000_000),
    )  # fmt: skip
    return chosen, found, changes


BUDGETED = (
    "gradient_checkpointing", "checkpointed_layers", "offload_checkpoints", "offload_embedding", "offload_head",
    "offload_layers", "resident_optimizer_MB",
)  # fmt: skip
"""Settings that `within_budget` may change, besides the two of the batch."""


def keep_budget(device: torch.device, budget_MB: int) -> None:
    """On CUDA, let the allocator take no more than the budget leaves beside the context; 0: all of the device again."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        share = (budget_MB * 1_000_000 - CUDA_CONTEXT) / total if budget_MB else 1.0
        torch.cuda.set_per_process_memory_fraction(min(max(share, 0.0), 1.0), device)


# --- too little -----------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """The caching allocator has an exception of its own; the CPU's, cuBLAS, Triton and the driver say it in words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def in_halves(run: Callable[[Sequence[T]], list[R]], batch: Sequence[T]) -> list[R]:
    """What `run` makes of each of a batch: of all at once, and of halves where memory runs out."""
    try:
        return run(batch)
    except (RuntimeError, MemoryError) as error:
        if len(batch) < 2 or not is_out_of_memory(error):
            raise
    # Outside the handler: its traceback holds on to the tensors that took the room.
    half = len(batch) // 2
    return in_halves(run, batch[:half]) + in_halves(run, batch[half:])


class Relief:
    """What gives way when a step runs out of memory, one thing at a time.

    Args:
        micro_batch: sequences at once. place: where offloaded things go, "host" or a folder.
        advice: what to tell who has nothing left to give: the plan of the smallest step, say.
        ranks: the processes of the run, which give way together.
    Attributes:
        micro_batch: what is left of it. place: where what gives way from now on goes.
    """

    def __init__(
        self, model: CausalLM, optimizer: torch.optim.Optimizer, micro_batch: int, place: str = "host",
        advice: str = "", ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        self._model, self._optimizer, self._advice = model, optimizer, advice
        self._ranks, self.place = ranks, place
        self._refused: list[str] = []
        self._taken: list[str] = []
        self.micro_batch = micro_batch

    def outlive(self, run: Callable[[], T], step: int, said: Callable[[str], None], *, in_update: bool = False) -> T:
        """run(), tried again with less in memory each time that it runs out of it.

        Args:
            run: the forward and backward passes of step `step`, or with `in_update` the optimizer's step. Tried again
                it draws the same random numbers, though smaller micro-batches cut them differently.
            said: is told what gave way.
        With several ranks, all try again when one ran out; but no update is made twice.

        Raises:
            TrainingError: nothing is left that could give way; or it was an update that can't be tried again.
            Broken: run raised it, on any rank.
        """
        device = self._model.device
        random = random_state(device)
        made = False
        while True:
            outcome = _WELL
            try:
                if not (made and in_update):
                    result, made = run(), True
            except Broken:
                outcome = _BROKEN
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._check_repeatable(error, step, in_update)
                outcome = _SHORT
            if (outcome := self._ranks.worst(outcome)) == _WELL:
                return result
            if outcome == _BROKEN:
                raise Broken
            # Out here the failed step's graph is gone with its exception.
            if not in_update:
                self._model.zero_grad(set_to_none=True)
                set_random_state(device, random)
            done = self.give_way(in_update=in_update)
            torch.cuda.empty_cache() if device.type == "cuda" else give_back_freed()
            self._ranks.check_same({"what gave way to memory": self._taken})
            if done is None:
                refused = "".join(f"; {why}" for why in self._refused)
                raise TrainingError(
                    f"step {step} is out of memory at micro-batch {self.micro_batch} with everything offloaded{refused}"
                    f": lower --cutoff_len or --lora_r{self._advice}"
                )
            said(f"step {step} ran out of memory: {done}; the {'update' if in_update else 'step'} is tried again")

    def _check_repeatable(self, error: Exception, step: int, in_update: bool) -> None:
        """TrainingError where what ran out of memory can't be tried again."""
        if in_update and not isinstance(self._optimizer, PagedAdamW):  # some parameters may have been updated
            raise TrainingError(
                f"the update of step {step} ran out of memory, and torch's AdamW can't be tried again: take "
                "--optim paged_adamw_32bit"
            ) from error
        if self._ranks.sharded:  # the others wait for this rank's part of a layer
            raise TrainingError(
                f"step {step} ran out of memory on rank {self._ranks.rank}, and with --fsdp it can't be tried again: "
                "lower --micro_batch_size or --cutoff_len, or give --gradient_checkpointing"
            ) from error

    def give_way(self, *, in_update: bool = False, among: Sequence[str] = ()) -> str | None:
        """Free something, and say what; None where nothing is left that could.

        Args:
            in_update: it was the optimizer's step that ran out: smaller activations would not help it.
            among: names of measures; left out: all.
        """
        measures = self._measures
        for name in among or measures:
            if in_update and name in ("micro_batch", "checkpointing", "checkpoints"):
                continue
            try:
                if (done := measures[name]()) is not None:
                    self._taken.append(name)
                    return done
            except InputError as error:  # the host has no room for that; the next one may need none
                if str(error) not in self._refused:
                    self._refused.append(str(error))
        return None

    def state(self) -> list[str]:
        """What gave way, in order."""
        return list(self._taken)

    def load(self, state: Sequence[str]) -> None:
        """Let the same give way again, in a model and an optimizer that were made as those were.

        Raises:
            InputError: a measure that is not known, or no room for what goes to the host.
        """
        for name in state:
            if name not in self._measures:
                raise InputError(f"the checkpoint says that {name!r} gave way, expected {', '.join(self._measures)}")
            self._measures[name]()
            self._taken.append(name)

    @property
    def _measures(self) -> dict[str, Callable[[], str | None]]:
        return {
            "moments": self._moments, "micro_batch": self._halve, "checkpointing": self._checkpoint,
            "checkpoints": self._checkpoints, "embedding": self._embedding, "head": self._head, "layers": self._stream,
        }  # fmt: skip

    def _moments(self) -> str | None:
        if not isinstance(self._optimizer, PagedAdamW) or not self._optimizer.resident_bytes:
            return None
        return f"{self._optimizer.evict() / 1e6:,.0f} MB of AdamW's moments go to the host"

    def _halve(self) -> str | None:
        if self.micro_batch == 1:
            return None
        self.micro_batch //= 2
        return f"micro-batches of {self.micro_batch} from now on, more of them to a step"

    def _checkpoint(self) -> str | None:
        if self._model.stack.gradient_checkpointing:
            return None
        self._model.stack.gradient_checkpointing = True
        return "every layer runs again in the backward pass from now on"

    def _checkpoints(self) -> str | None:
        if self._model.stack.checkpoint_offload is not None:
            return None
        self._model.stack.checkpoint_offload = CheckpointOffload(self.place)
        return "layers' inputs go to the host from now on"

    def _embedding(self) -> str | None:
        embedding = self._model.stack.embedding.weight
        if embedding.device.type == "cpu" or embedding is self._model.lm_head.weight:
            return None
        embedding.data = embedding.data.cpu()
        return f"the embedding, {embedding.nbytes / 1e6:,.0f} MB, goes to the host"

    def _head(self) -> str | None:
        model, head = self._model, self._model.lm_head
        if isinstance(head, StreamedHead):
            return None
        tied = head.weight is model.stack.embedding.weight
        streamed = StreamedHead(head.weight, model.device, self.place)
        if tied:
            model.stack.embedding.weight.data = head.weight.data.cpu()
        model.lm_head = streamed
        return f"the head, {streamed.nbytes / 1e6:,.0f} MB, is streamed from the host from now on"

    def _stream(self) -> str | None:
        """A quarter of the layers, of those that are not streamed yet."""
        stack = self._model.stack
        stream = stack.stream or LayerStream(self._model.device, self.place)
        left = [n for n, layer in enumerate(stack.layers) if n not in stream and _holds_nf4(layer)]
        if not left:
            return None
        stack.stream = stream
        count = min(-(-len(stack.layers) // 4), len(left))
        for number in (left[i] for i in spread(count, len(left))):
            stream.take(number, stack.layers[number])
        taken, size = len(stream.layers), stream.nbytes / 1e6
        return f"{taken} of {len(stack.layers)} layers, {size:,.0f} MB, are streamed from the host from now on"


def _holds_nf4(layer: torch.nn.Module) -> bool:
    return any(isinstance(module, NF4Linear) for module in layer.modules())


# --- what it takes --------------------------------------------------------------------------------------


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has held: the allocator's peak and the context on CUDA, else the RSS."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) + CUDA_CONTEXT
    status = Path("/proc/self/status")
    if status.exists():  # not ru_maxrss: a child inherits its parent's
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if line is not None:
            return int(line.split()[1]) << 10
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def current_bytes(device: torch.device) -> int:
    """What this process holds now."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device) + CUDA_CONTEXT
    status = Path("/proc/self/statm")
    if not status.exists():  # no Linux: the peak is the nearest figure there is
        return peak_bytes(device)
    import resource

    return int(status.read_text().split()[1]) * resource.getpagesize()


def give_back_freed() -> None:
    """Return to the system what the C allocator keeps of freed tensors; a loaded 1.1B model is 0.9 GB smaller then.

    glibc only: elsewhere freed memory stays with the process.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
