"""How much of what a device can compute a run makes use of: the operations of a training token, by arithmetic, over the
operations a second that the device's own matrix products reach, measured before the first step.

A product of [m, k] and [k, n] is 2 m k n operations, as Kaplan et al. 2020 (arXiv:2001.08361, section 2.1) count: 2 N a
token forward and 4 N backward for N weights that are trained. Here most weights are frozen, so for each weight it is

- 2 forward, and 2 for the gradient of what the layer read (dX), where that is wanted: not before the first adapter;
- of an adapter's weights 2 more, for their own gradients;
- attention's two products forward and four backward, 2 d a key each, over the keys that a query may see and no others;
- the head's, for the tokens whose loss counts: the logits and dX, and the logits a second time if it is streamed;
- the forward pass once more in layers that are checkpointed or streamed.

Left out: all that is no matrix product (norms, RoPE, softmax, activations, quantizing, dropout, AdamW), the products
that FlashAttention makes a second time, and what padding takes: a run that pads much has a low share, and so it should.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from jindo_core.causal_lm import CausalLM, ModelConfig
from jindo_core.data.examples import IGNORE, Example
from jindo_core.data.packing import Pack
from jindo_core.head import StreamedHead
from jindo_core.memory import is_out_of_memory
from jindo_core.plan import Job, Sizes, spread
from jindo_core.plan_falcon import FalconSizes
from jindo_core.prepare import TrainingJob

BUDGET = 0.4
"""Seconds that measuring may take."""

_SAMPLES, _SAMPLE = 5, 0.004
"""Timings of which the median counts, and the least that each takes: its resolution and a launch are lost in it."""

_LONGEST = 0.03
"""Seconds of one product at most: of a large one a slow device makes a part, `_PART` rows and columns or more."""

_PART = 128

_LOOKED_AT = 256
"""Examples that stand for all."""


# --- what a token takes -----------------------------------------------------------------------------------


def token_operations(job: Job, keys: Sequence[float], learnt: float) -> float:
    """Floating-point operations of a training token, forward and backward.

    Args:
        keys: for each layer, how many keys a query sees on average. learnt: the share of tokens whose loss counts.
    """
    sizes = job.sizes
    again = set(range(job.checkpointed_layers)) | set(spread(job.offload_layers, sizes.layers))
    total = learnt * 2.0 * sizes.vocab * sizes.hidden * (3 if job.offload_head else 2)
    for layer in range(sizes.layers):
        forward, backward = _of_a_layer(job, keys[layer], flowing=layer > 0)
        total += forward * (2 if layer in again else 1) + backward
    return total


def _of_a_layer(job: Job, keys: float, *, flowing: bool) -> tuple[float, float]:
    """Operations forward and backward. flowing: whether the layer's input takes a gradient."""
    linears, adapted, rank = job.sizes.linears, set(job.targets), job.lora_r
    scores = 2.0 * job.sizes.heads * job.sizes.head_dim * keys  # one product of a token with all its keys
    forward, backward = 2 * scores, 0.0
    for chain in _chains(job.sizes):
        wanted = flowing
        for place, names in enumerate(chain):
            for name in names:
                rows, columns = linears[name]
                forward += 2 * rows * columns
                backward += 2 * rows * columns * wanted
                if name in adapted:
                    forward += 2 * rank * (rows + columns)
                    backward += 2 * rank * (2 * rows + columns + columns * wanted)
            wanted = wanted or not adapted.isdisjoint(names)
            if place == 0 and chain is _chains(job.sizes)[0]:  # attention stands behind its projections
                backward += 4 * scores * wanted
    return forward, backward


_LLAMA = ((("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)),)
_FALCON = ((("query_key_value",), ("dense",)), (("dense_h_to_4h",), ("dense_4h_to_h",)))


def _chains(sizes: Sizes | FalconSizes) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """Linear layers in the order in which gradients need them, attention's first; a Falcon's halves stand apart."""
    return _FALCON if isinstance(sizes, FalconSizes) else _LLAMA


def keys_seen(config: ModelConfig, lengths: Sequence[int]) -> list[float]:
    """How many keys a query sees on average, its own among them, in each layer.

    Args:
        lengths: tokens of the documents, each of which is read for itself.
    """
    tokens, found = sum(lengths), []
    for layer in range(config.num_hidden_layers):
        memory, window = config.memory, config.window(layer)
        if memory is not None and layer not in memory.layers:
            parts = [end - start for length in lengths for start, end in memory.windows(length)]
        else:
            parts = list(lengths)
        found.append(sum(_pairs(length, window) for length in parts) / tokens)
    return found


def _pairs(length: int, window: int | None) -> int:
    """Of a query and a key that it sees."""
    seen = length if window is None else min(window, length)
    return seen * (seen + 1) // 2 + (length - seen) * seen


# --- what the device can do -------------------------------------------------------------------------------


def products_per_second(
    tokens: int, hidden: int, inner: int, dtype: torch.dtype, device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Floating-point operations a second of this device's products of [tokens, hidden] and [hidden, inner].

    Takes `BUDGET` seconds at most, and as much memory as one product does. torch's own random numbers are not drawn
    from, and the median of a few timings counts. Where one product would take long, a part of it is made.
    """

    def timed(x: Tensor, weight: Tensor, calls: int) -> float:
        """Seconds of one product."""
        _wait(device)
        began = clock()
        for _ in range(calls):
            F.linear(x, weight)
        _wait(device)
        return max((clock() - began) / calls, 1e-9)

    def probed(rows: int, columns: int) -> tuple[Tensor, Tensor, float]:
        x, weight = _numbers(rows, hidden, dtype, device), _numbers(columns, hidden, dtype, device)
        timed(x, weight, 1)  # a library's start, and what it makes for a shape
        return x, weight, timed(x, weight, 1)

    with torch.no_grad():
        began, rows, columns = clock(), min(tokens, _PART), min(inner, _PART)
        x, weight, took = probed(rows, columns)
        if (room := int(_LONGEST / took)) > 1 and (rows < tokens or columns < inner):
            wider = min(room, -(-inner // columns))
            rows, columns = min(room // wider * rows, tokens), min(wider * columns, inner)
            x, weight, took = probed(rows, columns)
        calls = max(1, int(_SAMPLE / took))
        found = [timed(x, weight, calls)]
        while len(found) < _SAMPLES and clock() - began < BUDGET - found[-1] * calls:
            found.append(timed(x, weight, calls))
    return 2.0 * rows * hidden * columns / statistics.median(found)


def _numbers(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random ones: of zeros a GPU makes products at a higher clock. A few, repeated: a CPU is slow to draw many."""
    few = torch.randn(min(rows * columns, 1 << 16), generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return few.repeat(-(-rows * columns // len(few)))[: rows * columns].view(rows, columns)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- a run's share ----------------------------------------------------------------------------------------


class Share:
    """What a run reaches of its devices' ceiling, since this was made.

    Args:
        step: a training step as it was planned. model: what is trained, which may give way to memory on the way.
        keys, learnt: as `token_operations` takes them. ceiling: operations a second of all ranks; None: not known.
        tokens, seconds: of the steps before.
    """

    def __init__(
        self, step: Job, model: CausalLM, keys: Sequence[float], learnt: float, ceiling: float | None,
        tokens: int = 0, seconds: float = 0.0,
    ) -> None:  # fmt: skip
        self.ceiling = ceiling
        self._step, self._model, self._keys, self._learnt = step, model, keys, learnt
        self._tokens, self._seconds, self._first = tokens, seconds, seconds
        self._operations = 0.0
        self._known: tuple[Job, float] | None = None

    @property
    def token_operations(self) -> float:
        """Of a training token, as the model is kept now."""
        stack = self._model.stack
        now = replace(
            self._step, checkpointed_layers=min(stack.checkpointed_layers, self._step.sizes.layers),
            offload_layers=0 if stack.stream is None else len(stack.stream.layers),
            offload_head=isinstance(self._model.lm_head, StreamedHead),
        )  # fmt: skip
        if self._known is None or self._known[0] != now:
            self._known = now, token_operations(now, self._keys, self._learnt)
        return self._known[1]

    def reached(self, tokens: int, seconds: float) -> float | None:
        """The share, 0 to 1, after so many tokens and seconds in all; None where the ceiling is not known, or the
        run goes beyond it: then products of one shape, out of the cache, were no measure for it."""
        self._operations += self.token_operations * (tokens - self._tokens)
        self._tokens, self._seconds = tokens, seconds
        passed = seconds - self._first
        if self.ceiling is None or passed <= 0:
            return None
        share = self._operations / passed / self.ceiling
        return share if share <= 1 else None


def share_of(job: TrainingJob, say: Callable[[str], None], *, tokens: int = 0, seconds: float = 0.0) -> Share:
    """Measure the devices of all ranks, which must call this together, and look at what a token takes.

    Args:
        say: is told where there is no room to measure. tokens, seconds: of the steps before.
    """
    step, model = job.step, job.model
    lengths, learnt = _what_is_read(job)
    batch = step.micro_batch * max(sum(lengths) // max(len(lengths), 1), 1)
    try:
        own = products_per_second(batch, step.sizes.hidden, step.sizes.inner, model.dtype, model.device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        say("no memory to measure this device's matrix products: the share of them is left out")
        own = math.nan
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # what a step has no tensors for
    (ceiling,) = job.ranks.totals(own)
    keys = keys_seen(model.config, lengths)
    return Share(step, model, keys, learnt, None if math.isnan(ceiling) else ceiling, tokens, seconds)


def _what_is_read(job: TrainingJob) -> tuple[list[int], float]:
    """Lengths of documents, and the share of tokens whose loss counts, from examples spread over all."""
    lengths: list[int] = []
    learnt = 0
    for example in _spread_out(job):
        lengths += example.documents if isinstance(example, Pack) else (len(example.input_ids),)
        learnt += sum(label != IGNORE for label in example.labels[1:])
    return lengths, learnt / max(sum(lengths), 1)


def _spread_out(job: TrainingJob) -> Iterator[Example]:
    count = len(job.examples)
    looked_at = min(count, _LOOKED_AT)
    return (job.examples[number * count // looked_at] for number in range(looked_at))
