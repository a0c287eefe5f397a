"""--compile: losses and gradients are the uncompiled layers', few graphs serve ragged batches, and what is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

from jindo_core import train as training
from jindo_core.compiled import MOST_VARIANTS, check_compile, compile_layers, compiled_graphs
from jindo_core.config import resolve_train_config
from jindo_core.errors import InputError, TrainingError
from jindo_core.loader import load_model
from jindo_core.lora import attach_lora
from jindo_core.memory import Relief
from jindo_core.recompute import CheckpointOffload

RAGGED = [(2, 16), (4, 40), (1, 24), (3, 8), (1, 64), (2, 104), (7, 32), (1, 16), (4, 72)]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(path, **changes):
    torch.manual_seed(0)
    model = load_model(path, dtype="fp32", device="cpu", **changes)
    return attach_lora(model, r=4, alpha=8, dropout=0.1, target_modules="all-linear").train()


def steps(model, shapes):
    """Loss and gradients of each batch, dropout on."""
    torch.manual_seed(1)
    found = []
    for batch, tokens in shapes:
        ids = torch.randint(0, 512, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    return found


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        ("plain", 5),
        pytest.param("checkpointed", 9, marks=pytest.mark.slow),
        pytest.param("streamed", 9, marks=pytest.mark.slow),
    ],
)
def test_ragged_batches_take_few_graphs_and_the_same_gradients(kind, most, stories260k):
    more = {"offload_layers": 2} if kind == "streamed" else {}
    plain, compiled = make(stories260k, **more), make(stories260k, **more)
    if kind == "checkpointed":
        for model in (plain, compiled):
            model.stack.checkpointed_layers, model.stack.checkpoint_offload = 3, CheckpointOffload()
    counter = CompileCounterWithBackend("aot_eager")
    compile_layers(compiled, backend=counter)
    for got, expected in zip(steps(compiled, RAGGED), steps(plain, RAGGED), strict=True):
        for mine, other in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    assert 1 < counter.frame_count <= most < MOST_VARIANTS
    before = counter.frame_count
    steps(compiled, [(2, 48), (5, 56), (1, 88), (6, 120)])  # shapes that were not seen
    assert counter.frame_count == before, "nothing is compiled anew"
    compiled.eval()
    with torch.no_grad():
        compiled(torch.ones(2, 9, dtype=torch.int64))
    assert counter.frame_count == before, "evaluation runs uncompiled"


@pytest.mark.slow
def test_a_compiled_run_is_an_uncompiled_one_to_rounding(stories260k, tmp_path, capsys):
    """Inductor, dropout on, micro-batches that give way, and on from a checkpoint without --compile."""
    data = [{"instruction": f"Count {i}.", "output": "one two three" + " and" * (i % 5)} for i in range(24)]
    (tmp_path / "rows.json").write_text(json.dumps(data))

    def run(out, **more):
        given = {
            "base_model": str(stories260k), "data_path": str(tmp_path / "rows.json"), "batch_size": 8,
            "micro_batch_size": 4, "max_steps": 4, "val_set_size": 4, "lora_r": 2, "lora_dropout": 0.2,
            "save_steps": 2, "prompt_template_name": "alpaca_short", "device": "cpu", "dtype": "fp32",
            "cutoff_len": 96, "output_dir": str(tmp_path / out),
        }  # fmt: skip
        training.train(*resolve_train_config(given | more))
        lines = (tmp_path / out / "metrics.jsonl").read_text().splitlines()
        return [row["loss"] for row in map(json.loads, lines) if "loss" in row]

    plain = run("plain")
    assert run("compiled", compile=True) == pytest.approx(plain, rel=1e-5)
    (tmp_path / "compiled" / "checkpoint-4").rename(tmp_path / "gone")
    capsys.readouterr()
    assert run("compiled", resume=True) == pytest.approx(plain, rel=1e-5)
    assert "compile" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "reason"), [("packing", "compiled anew"), ("fsdp", "between the processes")])
def test_what_it_does_not_go_with(name, reason):
    with pytest.raises(InputError, match=f"--compile: got it beside --{name}, expected one of them: .*{reason}"):
        check_compile(SimpleNamespace(**{"compile": True, "packing": False, "fsdp": False, name: True}))


def test_without_a_compiler_it_is_an_error_in_words(stories260k, monkeypatch):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(InputError, match=r"--compile: no C\+\+ compiler is found: install g\+\+"):
        compile_layers(make(stories260k))


def test_a_long_llama_and_a_failing_backend_are_errors_in_words(stories260k):
    model = make(stories260k)
    with pytest.raises(InputError, match="--compile: got it with a LongLLaMA"):
        compile_layers(SimpleNamespace(config=SimpleNamespace(memory=object())))

    def broken(*_):
        raise RuntimeError("no such kernel")

    compile_layers(model, backend=broken)
    said = r"--compile: torch.compile failed .*no such kernel.*: leave --compile out"
    with pytest.raises(TrainingError, match=said):
        steps(model, [(2, 8)])


def test_a_compiler_that_runs_out_of_memory_is_no_wrong_input(stories260k):
    """A step gives way to it, and goes on compiled."""
    model, tries = make(stories260k), []

    def short(graph, _):
        tries.append(1)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return graph.forward

    compile_layers(model, backend=short)
    before = compiled_graphs()
    relief = Relief(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), 2)
    gave_way = []
    found = relief.outlive(lambda: steps(model, [(relief.micro_batch, 8)]), 1, gave_way.append)
    assert len(found) == 1
    assert gave_way == ["step 1 ran out of memory: micro-batches of 1 from now on, more of them to a step; the step is "
                        "tried again"]  # fmt: skip
    assert compiled_graphs() > before
