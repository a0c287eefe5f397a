"""What a training step will hold in memory, by arithmetic on a model's sizes alone.

Held to a simulation of the real step (bench/simulation.py), with which it shares no code. Bytes throughout; MB and GB
are powers of ten.

A step's peak is at its head, where all that the forward pass keeps is there, and a chunk of the loss; or in a layer's
backward pass, where what the layers below keep is there, and that layer's activations with the gradients of its MLP,
the widest of what is alive at once. Two more where several processes share the step: while the last layer is gathered,
and when all gradients are summed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jindo_core import plan_falcon
from jindo_core.plan_falcon import FalconSizes

CONTEXT = 500_000_000
"""What a CUDA process occupies before its first tensor; no allocator's cap sees it."""

PAGE = 4 << 20
STAGING_PAGES = 3
HEAD_SLICE = 32 << 20
CHUNK_LOGITS = 2 * (1 << 24)
BLOCK, NESTED_BLOCK = 64, 256
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CUBLAS_WORKSPACE = 32 << 20
FRAGMENTATION = 0.03
"""Of what is not weights: what the allocator holds beyond what is asked of it, an estimate. An H100 held 239 MB
(checkpointed) and 273 MB more than the simulation of the same 8B steps, torch's AdamW and its temporaries included."""


class Sizes(NamedTuple):
    """A LLaMA's numbers. biases: elements of a layer's; attention_bias: whether q, k and v are among them."""

    hidden: int
    inner: int
    layers: int
    heads: int
    groups: int
    head_dim: int
    vocab: int
    tied: bool = False
    biases: int = 0
    attention_bias: bool = False

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> [out, in] of a layer's linear layers."""
        queries, keys = self.heads * self.head_dim, self.groups * self.head_dim
        c, i = self.hidden, self.inner
        shapes = ((queries, c), (keys, c), (keys, c), (c, queries), (i, c), (i, c), (c, i))
        return dict(zip(LINEARS, shapes, strict=True))

    @property
    def usual_targets(self) -> tuple[str, ...]:
        """The layers that are adapted where nobody names any."""
        return ("q_proj", "v_proj")

    @property
    def vectors(self) -> int:
        """Elements of the norms and biases."""
        return (2 * self.layers + 1) * self.hidden + self.layers * self.biases


SHAPES: dict[str, Sizes | FalconSizes] = {
    "llama-7b": Sizes(4096, 11008, 32, 32, 32, 128, 32000),
    "llama-13b": Sizes(5120, 13824, 40, 40, 40, 128, 32000),
    "llama-33b": Sizes(6656, 17920, 60, 52, 52, 128, 32000),
    "llama-65b": Sizes(8192, 22016, 80, 64, 64, 128, 32000),
    "llama2-7b": Sizes(4096, 11008, 32, 32, 32, 128, 32000),
    "llama2-13b": Sizes(5120, 13824, 40, 40, 40, 128, 32000),
    "llama2-70b": Sizes(8192, 28672, 80, 64, 8, 128, 32000),
    "llama3-8b": Sizes(4096, 14336, 32, 32, 8, 128, 128256),
    "llama3-70b": Sizes(8192, 28672, 80, 64, 8, 128, 128256),
    "tinyllama-1.1b": Sizes(2048, 5632, 22, 32, 4, 64, 32000),
    "smollm2-135m": Sizes(576, 1536, 30, 9, 3, 64, 49152, True),
    "falcon-7b": FalconSizes(4544, 18176, 32, 71, 1, 64, 65024),
    "falcon-40b": FalconSizes(8192, 32768, 60, 128, 8, 64, 65024, norms=2),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training step.

    Attributes:
        length: tokens of a sequence. micro_batch: sequences at once. accumulation: micro-batches to a step.
        targets: names of the adapted linears. itemsize: bytes of an activation's element.
        state_bits: of AdamW's moments, 32 or 8. paged: whether they may lie on the host.
        resident_states: bytes of them that stay on the device; None: all.
        checkpointed_layers: how many keep only their input. offload_checkpoints: those inputs lie on the host.
        offload_head: the head is streamed in slices; where it is the embedding too, both lie on the host.
        offload_layers: how many layers' weights are streamed (those are checkpointed, too).
        context: bytes outside the allocator: CUDA's, or on a CPU the process's. on_cuda: count its allocator's own.
        packed: sequences hold several documents; on CUDA attention's results are then held one by one and together.
        processes: how many share a step's rows; `accumulation` is one's. sharded: also the layers' matrices.
    """

    sizes: Sizes | FalconSizes
    length: int = 256
    micro_batch: int = 4
    accumulation: int = 1
    lora_r: int = 8
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    dropout: float = 0.05
    itemsize: int = 2
    quantized: bool = True
    double_quant: bool = True
    state_bits: int = 32
    paged: bool = True
    resident_states: int | None = None
    checkpointed_layers: int = 0
    offload_checkpoints: bool = False
    offload_embedding: bool = False
    offload_head: bool = False
    offload_layers: int = 0
    context: int = CONTEXT
    on_cuda: bool = True
    packed: bool = False
    processes: int = 1
    sharded: bool = False

    @property
    def tokens(self) -> int:
        return self.length * self.micro_batch

    @property
    def checkpoints(self) -> int:
        """Layers that run again in the backward pass."""
        extra = [n for n in spread(self.offload_layers, self.sizes.layers) if n >= self.checkpointed_layers]
        return self.checkpointed_layers + len(extra)


class Plan(NamedTuple):
    """rows: what is on the device at the peak; they add up to `peak_bytes`. elsewhere: on the host, or on the device at
    another moment (`loss_chunk` or `recompute`, whichever is not at the peak). All in bytes."""

    rows: dict[str, int]
    elsewhere: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        return sum(self.rows.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.elsewhere.get(name, 0) for name in HOST_ROWS)


HOST_ROWS = ("optimizer_paged", "offloaded_weights", "offloaded_checkpoints", "offloaded_embedding", "offloaded_head")


def plan(job: Job) -> Plan:
    """The components of a step, and its peak."""
    sizes, item = job.sizes, job.itemsize
    embedding = sizes.vocab * sizes.hidden * item
    on_host = job.offload_head if sizes.tied else job.offload_embedding
    codes, constants = _layer_weights(job)
    kept_layers = sizes.layers - job.offload_layers
    adapters = 4 * _adapter_elements(job) * sizes.layers
    states, staging = optimizer_states(job)
    resident = states if job.resident_states is None else min(job.resident_states // PAGE * PAGE, states)
    rows = {
        "weights": kept_layers * (_share(job) if job.sharded else codes),
        "constants": kept_layers * constants,
        "embedding": 0 if on_host else embedding,
        "head": 0 if sizes.tied or job.offload_head else embedding,
        "norms": sizes.vectors * item,
        "adapters": adapters,
        "optimizer_resident": resident,
        "optimizer_staging": staging if resident < states else 0,
        "streaming_buffers": min(job.offload_layers, 2) * (codes + constants)
        + 2 * _head_slice(job) * sizes.hidden * item,
        "scratch": _scratch(job),
    }
    moving, other = _moving(job)
    rows |= moving
    dynamic = sum(size for name, size in rows.items() if name not in ("weights", "constants", "embedding", "head"))
    rows["allocator"] = (round(FRAGMENTATION * dynamic) + CUBLAS_WORKSPACE) if job.on_cuda and job.context else 0
    rows["context"] = job.context
    away = job.checkpoints * job.tokens * sizes.hidden * item if job.offload_checkpoints else 0
    elsewhere = other | {
        "optimizer_paged": states - resident,
        "offloaded_weights": _pages((codes + constants) if job.offload_layers else 0) * job.offload_layers,
        "offloaded_checkpoints": away,
        "offloaded_embedding": embedding if on_host else 0,
        "offloaded_head": _pages(embedding) if job.offload_head else 0,
    }
    return Plan(rows, elsewhere)


# --- what stays -----------------------------------------------------------------------------------------


def _layer_weights(job: Job) -> tuple[int, int]:
    """Bytes of a layer's linears: codes and constants; or, not quantized, all of it and 0."""
    counts = [rows * columns for rows, columns in job.sizes.linears.values()]
    if not job.quantized:
        return sum(counts) * job.itemsize, 0
    constants = 0
    for count in counts:
        blocks = -(-count // BLOCK)
        constants += blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 if job.double_quant else 4 * blocks
    return sum(-(-count // 2) for count in counts), constants


def _share(job: Job) -> int:
    """Bytes of a layer's matrices that each process keeps: fully_shard cuts codes anywhere, other matrices between
    rows, and pads to equal parts."""
    parts, sizes = job.processes, job.sizes.linears.values()
    if job.quantized:
        return sum(-(-rows * columns // (2 * parts)) for rows, columns in sizes)
    return sum(-(-rows // parts) * columns for rows, columns in sizes) * job.itemsize


def _adapter_elements(job: Job) -> int:
    return sum(job.lora_r * sum(job.sizes.linears[name]) for name in job.targets)


def optimizer_states(job: Job) -> tuple[int, int]:
    """Bytes of AdamW's moments in whole pages, and of the buffers that they pass through when they do not stay."""
    capacity = PAGE // 8 if job.state_bits == 32 else PAGE // 520 * 256
    elements = 0
    for name in job.targets:
        # Each tensor starts at a block of 256.
        elements += sum(-(-job.lora_r * extent // 256) * 256 for extent in job.sizes.linears[name])
    pages = -(-elements * job.sizes.layers // capacity)
    return pages * PAGE, min(pages, STAGING_PAGES) * PAGE


def _scratch(job: Job) -> int:
    """The largest dequantized W."""
    if not job.quantized:
        return 0
    return max(rows * columns for rows, columns in job.sizes.linears.values()) * job.itemsize


def _head_slice(job: Job) -> int:
    """Rows of a slice of a streamed head, or 0."""
    return min(HEAD_SLICE // (job.sizes.hidden * job.itemsize), job.sizes.vocab) if job.offload_head else 0


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


# --- what comes and goes --------------------------------------------------------------------------------


def kept_by_a_layer(job: Job) -> int:
    """Bytes that a layer keeps for its backward pass, its input included."""
    if isinstance(job.sizes, FalconSizes):
        return plan_falcon.kept_by_a_layer(job.sizes, job)
    sizes, m, item = job.sizes, job.tokens, job.itemsize
    c, queries, keys = sizes.hidden, sizes.heads * sizes.head_dim, sizes.groups * sizes.head_dim
    adapted = set(job.targets)
    narrow = 2 * c  # the input of each half: the norms keep it
    narrow += c * bool(adapted & {"q_proj", "k_proj", "v_proj"}) + c * bool(adapted & {"gate_proj", "up_proj"})
    # q, k and v side by side (v stays, and holds the others; behind a bias it stands alone), q and k turned, and the
    # attention's result.
    narrow += (keys if sizes.attention_bias else queries + 2 * keys) + (queries + keys) + queries
    narrow += queries * (job.packed and job.on_cuda and "o_proj" in adapted)
    narrow += 2 * sizes.inner + sizes.inner * ("down_proj" in adapted)
    narrow += job.lora_r * len(adapted)
    return m * (narrow * item + 4 * (2 + sizes.heads))


def _untracked(job: Job) -> int:
    """Bytes of `kept_by_a_layer` that the first layer does not keep: before an adapter nothing has a gradient."""
    if isinstance(job.sizes, FalconSizes):
        return plan_falcon.untracked(job.sizes, job)
    sizes, adapted = job.sizes, set(job.targets)
    c, queries, keys = sizes.hidden, sizes.heads * sizes.head_dim, sizes.groups * sizes.head_dim
    if adapted & {"q_proj", "k_proj", "v_proj"}:
        return 0
    narrow, wide = c + (2 if sizes.attention_bias else 3) * (queries + keys), 1 + sizes.heads
    if "o_proj" in adapted:
        narrow -= queries
    else:
        narrow, wide = narrow + c, wide + 1
        if not adapted & {"gate_proj", "up_proj"}:
            narrow += 2 * sizes.inner
    return job.tokens * (narrow * job.itemsize + 4 * wide)


def _backward_of_a_layer(job: Job) -> int:
    """Bytes beyond what the layer keeps, at the worst moment of its backward pass."""
    if isinstance(job.sizes, FalconSizes):
        return plan_falcon.backward_of_a_layer(job.sizes, job)
    sizes, m, item = job.sizes, job.tokens, job.itemsize
    c, i, rank = sizes.hidden, sizes.inner, job.lora_r
    down = "down_proj" in job.targets
    # SwiGLU: dh, d gate and d up, while h is gone, and dY and the layer's result are there.
    swiglu = 3 * i * m * item - i * m * item * down
    # Before it, the down projection: dh and what its adapter's gradients take.
    dropped = job.dropout > 0
    own = m * rank * item * down + (m * i * item if dropped and down else 0)
    cast = rank * i * item
    product = i * m * item + own + (max(cast, rank * (i + c) * item) if down else 0)
    gradients = 4 * _adapter_elements(job) if job.checkpointed_layers or job.offload_layers else 0
    return max(swiglu, product) + 2 * c * m * item + gradients


def _loss(job: Job) -> int:
    """At the head: the normed hidden states, their gradient, and a chunk of logits with its rows."""
    sizes, m, item = job.sizes, job.tokens, job.itemsize
    if part := _head_slice(job):
        rows = min(max((1 << 24) // part, 1), m)
        # The hidden states, normed and those that are counted; their gradient in fp32 and rounded; logits in both.
        return m * sizes.hidden * (3 * item + 4) + rows * part * (4 + item)
    rows = max(CHUNK_LOGITS // sizes.vocab, 1)
    rows = min(rows // 128 * 128 if rows >= 128 else rows, m)
    chunk = rows * (-(-sizes.vocab // 16) * 16 + 2 * sizes.hidden) * item
    return 3 * m * sizes.hidden * item + chunk


def _moments(job: Job) -> Iterator[dict[str, int]]:
    """Rows of what comes and goes, at each moment that can be a step's peak: at the head, and in the backward pass of
    each layer, from the top one down.

    A layer that runs again holds its activations only then; but what the plain layers below it keep is still there, and
    streamed layers lie among those. With one micro-batch to a step gradients come as the layers are passed.
    """
    layers, boundary = job.sizes.layers, job.tokens * job.sizes.hidden * job.itemsize
    kept, backward = kept_by_a_layer(job), _backward_of_a_layer(job)
    streamed = set(spread(job.offload_layers, layers))
    again = [n < job.checkpointed_layers or n in streamed for n in range(layers)]
    own = 4 * _adapter_elements(job)

    gathered = _share(job) * job.processes if job.sharded else 0

    def rows(inputs: int, plain: int, passed: int, copies: int = 0) -> dict[str, int]:
        """inputs, plain: layers below (and here) that run again, and that do not; passed: layers above; copies: how
        many layers' bytes are gathered."""
        kept_inputs = min(inputs, 2) if job.offload_checkpoints else inputs
        untracked = _untracked(job) if plain and not again[0] else 0
        gradients = own * (layers if job.accumulation > 1 else passed)
        return {
            "gradients": gradients, "activations": plain * kept - untracked, "checkpoints": kept_inputs * boundary,
            "gathered": copies * gathered,
        }  # fmt: skip

    below = sum(again)
    if job.sharded:
        # The last layer is copied out of what came from all processes, and fully_shard still holds what came before.
        # Its input is there.
        under = sum(again[:-1])
        yield rows(under, layers - 1 - under, 0, min(layers + 1, 3)) | {"recompute": boundary}
    if job.processes > 1:
        yield rows(0, 0, layers) | {"gradient_bucket": own * layers}
    yield rows(below, layers - below, 0) | {"loss_chunk": _loss(job)}
    for n in reversed(range(layers)):
        passed, plain = layers - 1 - n, n + 1 - below
        repeated = kept - boundary if again[n] else 0
        # One is there, and what the next one is copied out of; the first layer has none below it.
        yield rows(below, plain, passed, 2 if n else 1) | {"recompute": repeated + backward}
        if again[n] and not n:  # while it runs again fully_shard still holds what it was copied out of
            yield rows(below, plain, passed, 2) | {"recompute": repeated}
        below -= again[n]


def _moving(job: Job) -> tuple[dict[str, int], dict[str, int]]:
    """(rows of what comes and goes at the peak, rows of those that are not there then)"""
    moments = list(_moments(job))
    worst = max(moments, key=lambda rows: sum(rows.values()))
    others = {name: max(rows.get(name, 0) for rows in moments) for name in _MOMENTARY}
    return worst, {name: size for name, size in others.items() if name not in worst}


_MOMENTARY = ("loss_chunk", "recompute", "gradient_bucket")
"""Rows that are not there at every moment."""


def spread(streamed: int, layers: int) -> list[int]:
    """The numbers of the layers that are streamed, evenly among `layers`: each copy has the layers between to run
    beside. The one rule of the engine that stands here, where no torch is needed."""
    return [(2 * i + 1) * layers // (2 * streamed) for i in range(streamed)]


# --- telling ---------------------------------------------------------------------------------------------


def as_json(
    job: Job, budget: int | None, changed: Job | None = None, changes: Sequence[NamedTuple] = ()
) -> dict[str, object]:
    """Every row of `job` in bytes, and the verdict; `with_changes`: the same of `changed`, in short."""
    found = plan(job)
    rows: dict[str, object] = {**found.elsewhere, **found.rows}
    after = None if changed is None or not changes else plan(changed)
    return rows | {
        "peak_bytes": found.peak_bytes, "host_bytes": found.host_bytes,
        "fits": None if budget is None else found.peak_bytes <= budget,
        "at_peak": [name for name, size in found.rows.items() if size],
        "changes": [change._asdict() for change in changes], "settings": _settings(job),
        "with_changes": None if after is None or changed is None or budget is None else {
            "peak_bytes": after.peak_bytes, "host_bytes": after.host_bytes, "fits": after.peak_bytes <= budget,
            "settings": _settings(changed),
        },
    }  # fmt: skip


def _settings(job: Job) -> dict[str, object]:
    return {name: value for name, value in dataclasses.asdict(job).items() if name != "sizes"}
