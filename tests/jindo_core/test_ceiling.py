"""Operations of a training token beside what FlopCounterMode counts in plain torch; and the measured ceiling."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from jindo_core import ceiling
from jindo_core.ceiling import Share, keys_seen, products_per_second, token_operations
from jindo_core.data.examples import Example
from jindo_core.data.packing import Pack
from jindo_core.falcon import FalconConfig
from jindo_core.kernels.attention import causal_mask
from jindo_core.long_memory import LongMemory
from jindo_core.model import LlamaConfig
from jindo_core.plan import Job, Sizes
from jindo_core.plan_falcon import FalconSizes

LLAMA = Sizes(32, 88, 3, 4, 2, 8, 96)
FALCON = FalconSizes(32, 128, 3, 4, 1, 8, 96)
LENGTH, ROWS = 24, 2


class Linear:
    """y = x Wᵀ, W frozen, and an adapter where there is to be one."""

    def __init__(self, out, into, rank):
        self.weight = torch.randn(out, into)
        self.a = nn.Parameter(torch.randn(rank, into)) if rank else None
        self.b = nn.Parameter(torch.randn(out, rank)) if rank else None

    def __call__(self, x):
        y = F.linear(x, self.weight)
        return y if self.a is None else y + F.linear(F.linear(x, self.a), self.b)


def attention(q, k, v, heads, groups):
    """Query by query, with the keys that it sees and no others: [B, T, H D] and twice [B, T, G D] -> [B, T, H D]."""
    q, k, v = (x.unflatten(-1, (n, -1)).transpose(1, 2) for x, n in ((q, heads), (k, groups), (v, groups)))
    k, v = (x.repeat_interleave(heads // groups, dim=1) for x in (k, v))
    rows = []
    for i in range(q.shape[2]):
        scores = (q[:, :, i : i + 1] @ k[:, :, : i + 1].transpose(2, 3)).softmax(-1)
        rows.append(scores @ v[:, :, : i + 1])
    return torch.cat(rows, 2).transpose(1, 2).flatten(2)


def llama_layer(x, linears, sizes):
    q, k, v = (linears[name](F.normalize(x)) for name in ("q_proj", "k_proj", "v_proj"))
    x = x + linears["o_proj"](attention(q, k, v, sizes.heads, sizes.groups))
    gate, up = (linears[name](F.normalize(x)) for name in ("gate_proj", "up_proj"))
    return x + linears["down_proj"](F.silu(gate) * up)


def falcon_layer(x, linears, sizes):
    normed, d = F.normalize(x), sizes.head_dim
    q, k, v = linears["query_key_value"](normed).split([sizes.heads * d, sizes.groups * d, sizes.groups * d], -1)
    beside = linears["dense_4h_to_h"](F.gelu(linears["dense_h_to_4h"](normed)))
    return x + linears["dense"](attention(q, k, v, sizes.heads, sizes.groups)) + beside


def counted(job, learnt):
    """Operations of a token, of a forward and a backward pass in plain torch."""
    torch.manual_seed(0)
    sizes, layer = job.sizes, falcon_layer if isinstance(job.sizes, FalconSizes) else llama_layer
    layers = [
        {name: Linear(*shape, job.lora_r * (name in job.targets)) for name, shape in sizes.linears.items()}
        for _ in range(sizes.layers)
    ]
    head, x = torch.randn(sizes.vocab, sizes.hidden), torch.randn(ROWS, LENGTH, sizes.hidden)
    rows = torch.arange(ROWS * LENGTH) < learnt * ROWS * LENGTH
    with FlopCounterMode(display=False) as counter, set_checkpoint_early_stop(False):
        for number, linears in enumerate(layers):
            if number < job.checkpointed_layers:
                x = checkpoint(layer, x, linears, sizes, use_reentrant=False)
            else:
                x = layer(x, linears, sizes)
        F.linear(x.flatten(0, 1)[rows], head).square().mean().backward()
    return counter.get_total_flops() / (ROWS * LENGTH)


@pytest.mark.parametrize("again", [0, 2, 3])
@pytest.mark.parametrize("sizes", [LLAMA, FALCON], ids=["llama", "falcon"])
def test_operations_are_what_plain_torch_makes(sizes, again):
    """Every linear adapted: to the last operation."""
    job = Job(sizes=sizes, lora_r=4, targets=tuple(sizes.linears), checkpointed_layers=again)
    keys = [(LENGTH + 1) / 2] * sizes.layers
    assert token_operations(job, keys, 0.5) == pytest.approx(counted(job, 0.5), rel=1e-12)


@pytest.mark.parametrize(
    ("sizes", "targets"),
    [
        (LLAMA, ("q_proj", "v_proj")), (LLAMA, ("o_proj",)), (LLAMA, ("gate_proj",)), (LLAMA, ("down_proj",)),
        (FALCON, ("query_key_value",)), (FALCON, ("dense", "dense_4h_to_h")), (FALCON, ("dense_h_to_4h",)),
    ],
)  # fmt: skip
def test_before_the_first_adapter_no_gradient_is_made(sizes, targets):
    """Of attention all four gradients' products count, where plain torch leaves out that of keys without an adapter in
    the first layer: within two percent then."""
    job = Job(sizes=sizes, lora_r=4, targets=targets)
    keys = [(LENGTH + 1) / 2] * sizes.layers
    exact = targets != ("q_proj", "v_proj")
    assert token_operations(job, keys, 1.0) == pytest.approx(counted(job, 1.0), rel=1e-12 if exact else 0.02)


def test_a_streamed_layer_runs_again_and_a_streamed_head_makes_its_logits_twice():
    job = Job(sizes=LLAMA, targets=("q_proj",))
    keys, streamed = [1.0] * 3, Job(sizes=LLAMA, targets=("q_proj",), offload_layers=3)
    again = Job(sizes=LLAMA, targets=("q_proj",), checkpointed_layers=3)
    assert token_operations(streamed, keys, 1) == token_operations(again, keys, 1) > token_operations(job, keys, 1)
    head = Job(sizes=LLAMA, targets=("q_proj",), offload_head=True)
    assert token_operations(head, keys, 0.5) - token_operations(job, keys, 0.5) == 0.5 * 2 * 32 * 96


def test_a_large_model_takes_four_operations_a_weight():
    """2 forward and 2 for dX; six where every layer runs again."""
    sizes = Sizes(4096, 11008, 32, 32, 32, 128, 32000)
    weights = 32 * sum(rows * columns for rows, columns in sizes.linears.values()) + 32000 * 4096
    plain = token_operations(Job(sizes=sizes), [1.0] * 32, 1.0)
    again = token_operations(Job(sizes=sizes, checkpointed_layers=32), [1.0] * 32, 1.0)
    assert plain / weights == pytest.approx(4, rel=0.01)
    assert again / weights == pytest.approx(6, rel=0.02)


def llama_config(**more):
    return LlamaConfig(96, 32, 88, 2, 4, 2, 8, **more)


@pytest.mark.parametrize("window", [1, 5, 40])
def test_keys_within_a_window(window):
    config = llama_config(sliding_window=window, layer_types=("full_attention", "sliding_attention"))
    lengths, tokens = [7, 30], 37
    seen = [
        sum(int(causal_mask(torch.arange(n), torch.arange(n), w).sum()) for n in lengths) / tokens
        for w in (None, window)
    ]
    assert keys_seen(config, lengths) == pytest.approx(seen)


def test_keys_of_a_falcon_and_of_a_longllama():
    falcon = FalconConfig(vocab_size=96, hidden_size=32, ffn_hidden_size=128, num_hidden_layers=2,
                          num_attention_heads=4, num_key_value_heads=1, norms=1)  # fmt: skip
    assert keys_seen(falcon, [3]) == [2.0, 2.0]
    memory = LongMemory((1,), context=8, last_context_length=4)
    # 14 tokens go in windows of 8, 2 and 4; the layer with memory sees all that came before.
    own, everything = (36 + 3 + 10) / 14, 14 * 15 / 2 / 14
    assert keys_seen(llama_config(memory=memory), [14]) == pytest.approx([own, everything])


# --- the measured ceiling -------------------------------------------------------------------------------


def ticking(step):
    """A clock that has gone on by `step` at each look."""
    return (n * step for n in itertools.count()).__next__


def test_operations_a_second_by_the_clock():
    # Two products to a timing, each of which takes one tick of the clock.
    found = products_per_second(32, 16, 48, torch.float32, torch.device("cpu"), clock=ticking(0.002))
    assert found == pytest.approx(2 * 32 * 16 * 48 / (0.002 / 2))


@pytest.mark.parametrize(
    ("tick", "inner", "part"),
    [
        (0.009, 48, (384, 48)), (0.3, 48, (128, 48)), (2.0, 1000, (128, 128)), (0.014, 1000, (128, 256)),
        (0.0049, 200, (384, 200)),
    ],
)  # fmt: skip
def test_a_slow_device_is_measured_by_fewer_and_smaller_products(tick, inner, part, monkeypatch):
    shapes, own = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, w: shapes.append((len(x), len(w))) or own(x, w))
    found = products_per_second(4096, 16, inner, torch.bfloat16, torch.device("cpu"), clock=ticking(tick))
    rows, columns = part
    assert found == pytest.approx(2 * rows * 16 * columns / tick)
    assert shapes[-1] == part
    assert len(shapes) <= 4 + 5


def test_a_real_clock_and_no_random_number_of_torchs_own():
    before = torch.get_rng_state()
    assert 0 < products_per_second(64, 32, 88, torch.float32, torch.device("cpu")) < math.inf
    assert torch.equal(torch.get_rng_state(), before)


def share(ceiling_of=1e6, **more):
    stack = SimpleNamespace(checkpointed_layers=0, stream=None)
    model = SimpleNamespace(stack=stack, lm_head=nn.Linear(1, 1))
    return Share(Job(sizes=LLAMA), model, [4.0] * 3, 1.0, ceiling_of, **more), stack


def test_the_share_counts_from_where_the_run_went_on():
    found, _ = share(1e6, tokens=100, seconds=10.0)
    operations = found.token_operations
    assert found.reached(101, 12.0) == pytest.approx(operations / 2 / 1e6)
    assert found.reached(103, 13.0) == pytest.approx(operations * 3 / 3 / 1e6)


def test_layers_that_give_way_take_more_operations_from_then_on():
    found, stack = share(1e7)
    plain = found.token_operations
    found.reached(1, 1.0)
    stack.checkpointed_layers = 3
    again = found.token_operations
    assert again > 1.3 * plain
    assert found.reached(2, 2.0) == pytest.approx((plain + again) / 2 / 1e7)


def test_no_share_above_one_and_none_without_a_ceiling():
    assert share(1.0)[0].reached(10, 1.0) is None
    assert share(None)[0].reached(10, 1.0) is None
    assert share()[0].reached(0, 0.0) is None


def test_no_room_to_measure_is_said_and_ends_nothing(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(ceiling, "products_per_second", fail)
    example = Example([1, 2, 3], [1, -100, 3])  # the first token is foretold by nothing
    model = SimpleNamespace(
        config=llama_config(), device=torch.device("cpu"), dtype=torch.float32, lm_head=nn.Linear(1, 1),
        stack=SimpleNamespace(checkpointed_layers=0, stream=None),
    )  # fmt: skip
    sizes, said = LLAMA._replace(layers=2), []
    ranks = SimpleNamespace(totals=lambda *values: values)
    job = SimpleNamespace(step=Job(sizes=sizes), model=model, examples=[example] * 3, ranks=ranks)
    found = ceiling.share_of(job, said.append)
    assert found.ceiling is None
    assert said == ["no memory to measure this device's matrix products: the share of them is left out"]
    # Of three tokens one is learnt, and each sees two keys on average.
    assert found.token_operations == token_operations(Job(sizes=sizes), [2.0, 2.0], 1 / 3)


def test_packs_are_read_document_by_document():
    pack = Pack([1, 2, 3, 4, 5, 6], [-100, 2, -100, 4, 5, 6], (2, 4))
    job = SimpleNamespace(examples=[pack, Example([1, 2], [-100, 2])])
    assert ceiling._what_is_read(job) == ([2, 4, 2], 5 / 8)


def test_of_many_examples_a_few_spread_over_all_are_looked_at():
    examples = [Example([1] * (1 + number // 1000), [1] * (1 + number // 1000)) for number in range(10_000)]
    lengths, _ = ceiling._what_is_read(SimpleNamespace(examples=examples))
    assert len(lengths) == 256
    assert sum(lengths) / 256 == pytest.approx(5.5, rel=0.01)


def test_a_defect_while_measuring_is_not_taken_for_want_of_memory(monkeypatch):
    monkeypatch.setattr(ceiling, "products_per_second", lambda *_: torch.ones(2) @ torch.ones(3))
    job = SimpleNamespace(
        step=Job(sizes=LLAMA), examples=[Example([1, 2], [1, 2])],
        model=SimpleNamespace(dtype=torch.float32, device=torch.device("cpu")),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="size"):
        ceiling.share_of(job, pytest.fail)
