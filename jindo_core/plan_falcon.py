"""The part of the memory plan that is Falcon's own: what a layer whose attention and MLP lie side by side holds.

`plan.py` says what the figures are for, and is held to the simulation in the same way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jindo_core.plan import Job

LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
FIRST = frozenset({"query_key_value", "dense_h_to_4h"})
"""What reads a norm."""


class FalconSizes(NamedTuple):
    """A Falcon's numbers. norms: before a layer's two halves, one for both or one each."""

    hidden: int
    inner: int
    layers: int
    heads: int
    groups: int
    head_dim: int
    vocab: int
    norms: int = 1
    tied: bool = True
    bias: bool = False

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def fused(self) -> int:
        """Width of queries, keys and values together."""
        return (self.heads + 2 * self.groups) * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> [out, in] of a layer's linear layers."""
        c, i = self.hidden, self.inner
        return dict(zip(LINEARS, ((self.fused, c), (c, self.queries), (i, c), (c, i)), strict=True))

    @property
    def usual_targets(self) -> tuple[str, ...]:
        """The layers that are adapted where nobody names any: peft's choice."""
        return ("query_key_value",)

    @property
    def vectors(self) -> int:
        """Elements of norms and biases."""
        biases = sum(rows for rows, _ in self.linears.values()) if self.bias else 0
        return self.layers * (2 * self.norms * self.hidden + biases) + 2 * self.hidden


def kept_by_a_layer(sizes: FalconSizes, job: Job) -> int:
    """Bytes that a layer keeps for its backward pass, its input included."""
    c, item, adapted = sizes.hidden, job.itemsize, set(job.targets)
    narrow = c  # x, which the norms keep
    narrow += c * (bool(adapted & FIRST) if sizes.norms == 1 else len(adapted & FIRST))
    # v lies in the fused result and holds it whole; GELU keeps its input.
    narrow += sizes.fused + sizes.inner
    narrow += (sizes.heads + sizes.groups) * sizes.head_dim + sizes.queries  # q and k turned; the attention's result
    narrow += sizes.queries * (job.packed and job.on_cuda and "dense" in adapted)
    narrow += sizes.inner * ("dense_4h_to_h" in adapted) + job.lora_r * len(adapted)
    return job.tokens * (narrow * item + 4 * (2 * sizes.norms + sizes.heads))


def untracked(sizes: FalconSizes, job: Job) -> int:
    """Bytes of `kept_by_a_layer` that the first layer does not keep: before an adapter nothing has a gradient."""
    adapted = set(job.targets)
    narrow, wide = sizes.hidden, 2 * sizes.norms
    if "query_key_value" not in adapted:
        narrow += sizes.fused + (sizes.heads + sizes.groups) * sizes.head_dim
        narrow += sizes.queries * ("dense" not in adapted)
        wide += sizes.heads
    if "dense_h_to_4h" not in adapted:
        narrow += sizes.inner
    return job.tokens * (narrow * job.itemsize + 4 * wide)


def backward_of_a_layer(sizes: FalconSizes, job: Job) -> int:
    """Bytes beyond what the layer keeps, at the worst moment of its backward pass."""
    m, item, rank, adapted = job.tokens, job.itemsize, job.lora_r, set(job.targets)
    c, i = sizes.hidden, sizes.inner
    down = "dense_4h_to_h" in adapted
    # GELU: dh and its input's gradient, while h is gone.
    gelu = 2 * i - i * down
    # Before it, the down projection: dh and what its adapter's gradients take.
    dropped = i if job.dropout > 0 and down else 0
    product = i + dropped + rank * down
    cast = rank * (i + c) if down else 0
    gradients = 4 * rank * sum(sum(sizes.linears[name]) for name in job.targets)
    moments = [gelu * m * item, (product * m + cast) * item, _attention_backward(sizes, job)]
    return max(moments) + 2 * c * m * item + (gradients if job.checkpointed_layers or job.offload_layers else 0)


def _attention_backward(sizes: FalconSizes, job: Job) -> int:
    """Its gradients and FlashAttention-2's temporaries (dQ in fp32; where heads share keys, dK and dV of every head),
    while what the MLP kept is gone."""
    m, item, width = job.tokens, job.itemsize, sizes.queries
    gone = sizes.inner * (1 + ("dense_4h_to_h" in job.targets))
    rows, padded = -(-job.length // 128) * 128, -(-sizes.head_dim // 32) * 32
    inside = job.micro_batch * rows * sizes.heads * (padded + 1) * 4
    inside += 2 * m * width * item if sizes.heads != sizes.groups else 0
    return (width + sizes.fused - gone) * m * item + inside
