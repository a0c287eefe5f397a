"""The simulated step: it counts what is really allocated, and the planner's arithmetic agrees with it."""

from __future__ import annotations

import gc
import importlib
import itertools
import os
import subprocess
import sys

import pytest
import torch

from jindo_core import plan_falcon
from jindo_core.kernels import linear_cross_entropy as cross_entropy
from jindo_core.kernels import lora_matmul, nf4
from jindo_core.kernels import lora_matmul_reference as lora_reference
from jindo_core.kernels.lora_matmul import Projection
from jindo_core.plan import LINEARS, SHAPES, Job, Sizes, plan


@pytest.fixture(scope="module")
def simulation(repo_root):
    return importlib.import_module("bench.simulation")


@pytest.fixture(scope="module")
def shapes(repo_root):
    return importlib.import_module("bench.shapes").SHAPES


def both(simulation, shape, *, layers=None, targets=LINEARS, biases=0, attention_bias=False, **given):
    """The simulation and the plan of one step, and the bytes of weights in both."""
    shape = shape if layers is None else shape._replace(layers=layers)
    names = "all-linear" if targets in (LINEARS, plan_falcon.LINEARS) else list(targets)
    simulated = simulation.simulate(shape, simulation.Step(targets=names, **given))
    if shape.name in SHAPES:
        sizes = SHAPES[shape.name]._replace(layers=shape.layers)
    else:
        sizes = Sizes(
            shape.hidden, shape.inner, shape.layers, shape.heads, shape.groups, shape.hidden // shape.heads,
            shape.vocab, biases=biases, attention_bias=attention_bias,
        )  # fmt: skip
    more = dict(given)
    if not more.pop("resident_states", True):
        more["resident_states"] = 0
    more["sharded"] = more.pop("fsdp", False)
    more = {"length": more.pop("tokens"), "dropout": 0.0, "accumulation": 2} | more
    planned = plan(Job(sizes=sizes, targets=targets, context=0, on_cuda=False, **more))
    fixed = sum(planned.rows[name] for name in ("weights", "constants", "embedding", "head", "norms", "adapters"))
    return simulated.peak, planned.peak_bytes, fixed


def agree(simulated, planned, fixed):
    assert planned == pytest.approx(simulated, rel=0.03)
    # Of a large model most is weights, where nobody errs: what comes and goes has to agree too.
    assert planned - fixed == pytest.approx(simulated - fixed, rel=0.05)


@pytest.mark.parametrize("checkpointed", [0, 2, 4])
@pytest.mark.parametrize("targets", [LINEARS, ("down_proj",)])
def test_the_plan_agrees_where_q_k_and_v_have_biases(targets, checkpointed, simulation, shapes, monkeypatch):
    """What a Qwen2 keeps: q and k are gone once they are turned."""
    real = simulation._build

    def biased(*given):
        model = real(*given)
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                linear = getattr(layer.self_attn, name)
                base = getattr(linear, "base", linear)
                base.bias = torch.nn.Parameter(torch.zeros(base.out_features, dtype=model.dtype), requires_grad=False)
        return model

    monkeypatch.setattr(simulation, "_build", biased)
    agree(
        *both(
            simulation, shapes["8b"], layers=4, tokens=512, micro_batch=4, checkpointed_layers=checkpointed,
            targets=targets, biases=6144, attention_bias=True,
        )
    )  # fmt: skip


GRID = list(itertools.product(["7b", "8b", "13b", "70b"], [512, 2048], [1, 4], ["none", "some", "all"]))
GRID += [("33b", 512, 1, "all"), ("65b", 512, 1, "all"), ("65b", 2048, 1, "some")]


@pytest.mark.parametrize(("name", "tokens", "micro_batch", "checkpointed"), GRID)
def test_the_plan_agrees(name, tokens, micro_batch, checkpointed, simulation, shapes):
    """Four layers of each; ranks, targets and dropout taken in turn."""
    turn = GRID.index((name, tokens, micro_batch, checkpointed))
    agree(
        *both(
            simulation, shapes[name], layers=4, tokens=tokens, micro_batch=micro_batch,
            checkpointed_layers={"none": 0, "some": 2, "all": 4}[checkpointed], lora_r=(8, 64)[turn // 3 % 2],
            targets=(LINEARS, ("q_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj"))[turn // 2 % 3],
            dropout=(0.0, 0.05)[turn // 5 % 2], accumulation=1 + turn // 4 % 2,
        )
    )  # fmt: skip


FALCON_GRID = list(itertools.product(["falcon-7b", "falcon-40b"], [512, 2048], ["none", "some", "all"]))


@pytest.mark.parametrize(("name", "tokens", "checkpointed"), FALCON_GRID)
def test_the_plan_of_a_falcon_agrees(name, tokens, checkpointed, simulation, repo_root):
    """Four layers of each; targets, ranks, micro-batches and dropout taken in turn."""
    turn = FALCON_GRID.index((name, tokens, checkpointed))
    falcons = importlib.import_module("bench.shapes").FALCONS
    agree(
        *both(
            simulation, falcons[name], layers=4, tokens=tokens, micro_batch=(1, 3)[turn % 2],
            checkpointed_layers={"none": 0, "some": 2, "all": 4}[checkpointed], lora_r=(8, 64)[turn // 3 % 2],
            targets=(plan_falcon.LINEARS, ("query_key_value",), ("dense", "dense_4h_to_h"))[(turn // 3 + turn + 1) % 3],
            dropout=(0.0, 0.05)[turn // 5 % 2],
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    "given",
    [
        {"resident_states": False},
        {"state_bits": 8},
        {"offload_checkpoints": True, "checkpointed_layers": 6},
        {"offload_layers": 3},
        {"offload_embedding": True},
        {"offload_head": True},
        {"offload_head": True, "checkpointed_layers": 0, "tokens": 2048, "micro_batch": 2},
        {"offload_layers": 1, "checkpointed_layers": 0},
        {"offload_layers": 5, "checkpointed_layers": 0, "tokens": 2048},
        {"offload_layers": 3, "checkpointed_layers": 2, "tokens": 2048, "micro_batch": 2},
        {"offload_layers": 3, "checkpointed_layers": 3, "accumulation": 1, "lora_r": 64},
        {"lora_r": 256, "accumulation": 1},
        {"offload_layers": 6, "offload_checkpoints": True, "offload_embedding": True, "resident_states": False},
    ],
    ids=str,
)
def test_the_plan_of_what_is_offloaded_agrees(given, simulation, shapes):
    more = {"checkpointed_layers": 6, "tokens": 512, "micro_batch": 1, "lora_r": 8} | given
    agree(*both(simulation, shapes["7b"], layers=6, **more))


# Where the peak is: at a gather, in a layer's backward pass, or where all gradients are summed.
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("70b", {}),
        ("70b", {"tokens": 2048, "checkpointed_layers": 2, "lora_r": 64}),
        ("70b", {"checkpointed_layers": 0, "accumulation": 1}),
        ("7b", {"tokens": 2048, "micro_batch": 2, "processes": 3}),
        ("7b", {"lora_r": 256, "accumulation": 1}),
        ("7b", {"processes": 8, "resident_states": False, "offload_checkpoints": True, "offload_embedding": True}),
        ("8b", {"offload_head": True, "state_bits": 8}),
        ("8b", {"fsdp": False, "lora_r": 512, "accumulation": 1}),
        ("falcon-40b", {"targets": plan_falcon.LINEARS}),
    ],
    ids=str,
)
def test_the_plan_of_one_of_several_processes_agrees(name, given, simulation, shapes):
    found = shapes | importlib.import_module("bench.shapes").FALCONS
    usual = {"tokens": 512, "micro_batch": 1, "lora_r": 8, "checkpointed_layers": 3, "processes": 2, "fsdp": True}
    agree(*both(simulation, found[name], layers=3, **(usual | given)))


@pytest.mark.parametrize(("processes", "inner"), [(2, 1376), (3, 1375)])
def test_shares_and_gathers_to_the_byte(processes, inner, simulation, shapes, monkeypatch):
    """Codes that no number of processes divides are padded."""
    monkeypatch.setattr(simulation, "ROUNDING", 1)
    shape = shapes["tiny"]._replace(hidden=512, inner=inner, layers=3, heads=8, groups=2)
    step = simulation.Step(tokens=8, checkpointed_layers=3, processes=processes, fsdp=True)
    simulated = simulation.simulate(shape, step).at_peak
    sizes = Sizes(512, inner, 3, 8, 2, 64, shape.vocab)
    rows = plan(
        Job(
            sizes=sizes, length=8, micro_batch=1, targets=LINEARS, checkpointed_layers=3, processes=processes,
            sharded=True,
        )
    ).rows  # fmt: skip
    assert rows["weights"] == simulated["weights"]
    assert rows["gathered"] == simulated["gathered"] == 3 * rows["weights"] // 3 * processes


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "offload"), [(512, False), (4096, True)])
def test_70b_on_two_devices_of_24_gb(tokens, offload, simulation, shapes):
    """LLaMA-2 70B in shards, by the simulation alone: all linears, r 8, checkpointed, 0.5 GB context."""
    found = both(
        simulation, shapes["70b"]._replace(name="llama2-70b", vocab=32000), tokens=tokens, micro_batch=1, lora_r=8,
        checkpointed_layers=80, resident_states=False, offload_checkpoints=offload, processes=2, fsdp=True,
    )  # fmt: skip
    agree(*found)
    assert found[0] + 0.5e9 <= 24e9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "limit"), [("7b", 5.4e9), ("13b", 10e9), ("33b", 20e9), ("65b", 40e9), ("70b", 48e9)]
)
def test_whole_models(name, limit, simulation, shapes):
    """The goals, by the simulation alone: all linears, r 8, 512 tokens, checkpointed, moments paged, 0.5 GB context."""
    shape = shapes[name]
    found = both(
        simulation, shape, tokens=512, micro_batch=1, lora_r=8, checkpointed_layers=shape.layers, resident_states=False
    )  # fmt: skip
    agree(*found)
    assert found[0] + 0.5e9 <= limit


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("name", "micro_batch"), [("135m", 4), ("1b", 1)])
def test_the_growth_of_a_real_process(name, micro_batch, checkpointed, simulation, shapes, repo_root):
    """Real steps on this CPU, 512 tokens: the process grows by what was simulated."""
    layers = shapes[name].layers * checkpointed
    command = [sys.executable, "-m", "bench.simulation", "--measure", "--shape", name]
    command += ["--micro_batch", str(micro_batch), "--checkpointed_layers", str(layers)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=True, env=environment)
    step = simulation.Step(micro_batch=micro_batch, checkpointed_layers=layers)
    found = simulation.simulate(shapes[name], step, cuda=False)
    assert int(done.stdout.split()[-1]) == pytest.approx(found.peak - found.at_start, rel=0.1)


def test_live_storages_are_counted(simulation):
    counter = simulation.LiveBytes(lambda name, args: (0, 0))
    with counter:
        a = torch.zeros(1000)  # 4,000 bytes, 4,096 for the allocator
        b = a[10:]
        assert counter.live == 4096
        c = a + 1
        del a
        gc.collect()
        assert counter.live == 2 * 4096, "b holds a's storage"
        del b
        gc.collect()
        assert counter.live == 4096
        counter.name("kept", [c])
        d = torch.zeros(5000)
    assert counter.peak == 4096 + 20480
    assert counter.at_peak["kept"] == 4096
    del d


# --- operators' declarations, held to what their references allocate --------------------------------------


def measured(simulation, run):
    """Bytes at the peak of a call beyond what it returns."""
    counter = simulation.LiveBytes(lambda name, args: (0, 0))
    with counter:
        result = run()
        gc.collect()
        kept = counter.live
    assert result is not None
    return counter.peak - kept


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("widths", [(256,), (256, 64, 64)])
def test_lora_matmul_declares_what_it_needs(dropout, widths, simulation, monkeypatch):
    rows, k, r, dtype = 512, 384, 16, torch.bfloat16
    monkeypatch.setattr(lora_reference, "scratch", lambda shape, dtype, _: torch.empty(shape, dtype=dtype))
    layers = []
    for n in widths:
        packed, absmax = nf4.nf4_quantize(torch.randn(n, k))
        layers.append(Projection(packed, *_double(absmax), n, torch.randn(r, k), torch.randn(n, r), 2.0))
    x, seed = torch.randn(rows, k).to(dtype), torch.tensor([3], dtype=torch.int32)
    y, down, _ = lora_reference.forward_reference(x, layers, 64, dropout, seed, False)
    scratch = lora_matmul.scratch_bytes(k, widths, dtype)
    sizes = rows, k, widths, [r] * len(widths), dtype, dropout
    declared = [lora_matmul.workspace_bytes(*sizes, backward=again) for again in (False, True)]
    forward = measured(simulation, lambda: lora_reference.forward_reference(x, layers, 64, dropout, seed, False))
    backward = measured(
        simulation,
        lambda: lora_reference.backward_reference(y, x, layers, k, 64, down, None, dropout, seed, True),
    )
    # The mask's own temporaries (int32, the reference's) are no part of the GPU's, whose kernel makes it in registers.
    mask = rows * k * 4 * 3 if dropout else 0
    for real, said in ((forward, declared[0]), (backward, declared[1])):
        assert real <= said + scratch + mask + 8192
        assert said <= real + 8192


def _double(absmax):
    return nf4.nf4_quantize_absmax(absmax)


def test_linear_cross_entropy_declares_what_it_needs(simulation, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_CHUNK_LOGITS", 1 << 16)
    hidden, weight = torch.randn(512, 64).bfloat16(), torch.randn(1000, 64).bfloat16()
    labels = torch.arange(512)
    real = measured(
        simulation, lambda: cross_entropy.forward_reference(hidden, weight, labels, -100, 0.0, True, False)
    )
    said = cross_entropy.workspace_bytes(512, 64, 1000, torch.bfloat16)
    assert real == pytest.approx(said, rel=0.1)
