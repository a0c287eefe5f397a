"""bench/gpu.py where there is no GPU: the same code on tiny shapes, from a folder that was never installed."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import time

import pytest

PARTS = ("jindo_core", "kernels", "cli", "bench")
FAKE = """
import json, sys, time
value = lambda name: sys.argv[sys.argv.index(name) + 1]
at = sys.argv.index("--skip")
skip = sys.argv[at + 1 : sys.argv.index("--wrong")]
def write(**line):
    with open(value("--record"), "a") as file:
        file.write(json.dumps(line) + "\\n")
"""


@pytest.fixture
def gpu(repo_root, monkeypatch):
    monkeypatch.syspath_prepend(str(repo_root))
    return importlib.import_module("bench.gpu")


@pytest.fixture
def section(gpu, tmp_path, monkeypatch):
    """section(body, seconds): what `supervise` makes of a section whose process runs `body`."""

    def run(body, seconds=20.0):
        (tmp_path / "fake.py").write_text(FAKE + body)
        monkeypatch.setattr(gpu, "__file__", str(tmp_path / "fake.py"))
        monkeypatch.setattr(gpu, "GRACE", 0.1)
        return gpu.supervise("operators", gpu.arguments([]), time.monotonic() + seconds, [])

    return run


def run_script(root, out, *flags):
    env = {**os.environ, "OUT": str(out), "PYTHONPATH": ""}
    command = [sys.executable, str(root / "bench" / "gpu.py"), "--device", "cpu", "--quick", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=root.parent, check=False)
    files = list(out.glob("*.json"))
    return done, json.loads(files[0].read_text()) if files else None


def test_a_plain_folder_with_a_wrong_kernel(repo_root, tmp_path):
    """Copied without the two links and with a mistake in it: the links come back, the mistake is found and named,
    its operator is not timed, and the rest is."""
    root = tmp_path / "plain"
    leave = shutil.ignore_patterns("*.so", "__pycache__", "results")
    for part in PARTS:
        shutil.copytree(repo_root / part, root / part, symlinks=True, ignore=leave)
    for name in ("kernels", "cli"):
        (root / "jindo_core" / name).unlink()
    (root / "tests" / "kernels").mkdir(parents=True)
    shutil.copy(repo_root / "tests" / "kernels" / "conftest.py", root / "tests" / "kernels")
    kernel = root / "kernels" / "swiglu.py"
    kernel.write_text(kernel.read_text().replace("silu(gate.to(wide)) * up", "silu(gate.to(wide)) + up"))
    done, content = run_script(root, tmp_path / "out", "--sections", "correctness,operators")
    assert done.returncode == 1, done.stderr
    assert (root / "jindo_core" / "kernels").is_symlink()
    wrong = [line["operator"] for line in content["correctness"] if line["failed"]]
    assert wrong == ["swiglu"]
    assert {line["operator"] for line in content["correctness"]} >= {"nf4", "lora_matmul", "rope", "opcheck"}
    assert not content["correct"]
    assert not content["measured"], "figures of tiny shapes are no measurement"
    timed = {row["operator"] for row in content["rows"]}
    assert "swiglu" not in timed
    assert {"nf4", "lora_matmul", "rms_norm", "rope", "linear_cross_entropy"} <= timed
    assert [e["section"] for e in content["errors"]] == ["operators"] * 2
    assert all("swiglu is wrong" in error["refused"] for error in content["errors"])
    assert all(row["rate"] > 0 and row["share"] > 0 for row in content["rows"])
    assert "CORRECTNESS FAILED" in done.stdout


def test_a_model_built_as_its_plan_says_trains(gpu):
    """bench/caps.py without a cap: everything that a budget can ask for, in a real step."""
    import torch

    from bench.caps import build, run
    from bench.shapes import SHAPES
    from jindo_core.memory import sizes_of
    from jindo_core.plan import LINEARS, Job

    shape, device = SHAPES["tiny"], torch.device("cpu")
    found = run(shape, 600, 64, torch.float32, device, 2)
    assert found["losses"][-1] < found["losses"][0]
    assert (found["changes"], found["gave_way"]) == ([], [])
    away = Job(
        sizes=sizes_of(shape.config()), targets=LINEARS, dropout=0.0, checkpointed_layers=1, offload_layers=1,
        offload_checkpoints=True, offload_embedding=True, offload_head=True,
    )  # fmt: skip
    model, ids = build(shape, away, torch.float32, device), torch.arange(40)[None]
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.model.stream.layers
    assert model.lm_head.weight.is_meta
    with pytest.raises(RuntimeError, match="tiny does not fit 500 MB"):
        run(SHAPES["tiny"], 500, 64, torch.float32, torch.device("cpu"), 2)


@pytest.mark.slow
def test_all_sections(repo_root, tmp_path):
    done, content = run_script(repo_root, tmp_path)
    assert done.returncode == 0, done.stderr
    assert content["correct"]
    assert content["errors"] == []
    assert {"training step", "decoding step"} <= {row["name"] for row in content["rows"]}
    assert {line["who"] for line in content["memory"]} == {"jindo", "peft + bitsandbytes"}
    assert [line["shape"] for line in content["caps"]] == ["tiny"]
    assert all(not row.get("failed_peers") for row in content["rows"])


def test_a_section_goes_on_behind_a_piece_that_spoiled_its_process(section):
    lines = section(
        """
if "a" not in skip:
    write(facts={})
    write(piece="a", start=True); write(piece="a", row={"x": 1})
    write(piece="b", start=True); write(piece="b", error="CUDA error"); sys.exit(3)
assert skip == ["a", "b"]
write(piece="c", start=True); write(piece="c", row={"x": 2})
"""
    )
    assert [line.get("piece") for line in lines] == [None, "a", "b", "c"]
    assert lines[2]["error"] == "CUDA error"


def test_a_piece_that_kills_its_process_is_named_and_passed_over(section):
    lines = section(
        """
import os
if not skip:
    write(piece="a", start=True); os._exit(9)
write(piece="b", start=True); write(piece="b", row={})
"""
    )
    assert lines == [{"piece": "a", "error": "the process died: 9"}, {"piece": "b", "row": {}}]


def test_a_section_that_hangs_ends_at_its_deadline(section):
    started = time.monotonic()
    lines = section('write(piece="a", start=True)\ntime.sleep(60)', seconds=0.6)
    assert time.monotonic() - started < 10
    assert lines == [{"piece": "a", "error": "the process died: ended at its deadline"}]


def test_a_section_that_can_t_start_says_so_once(section):
    assert section("sys.exit(1)") == [{"piece": "operators", "error": "the section could not start (exit code 1)"}]


def test_unfinished_correctness_is_not_correct(gpu):
    done = {"piece": "nf4", "checks": 3, "failed": [], "operator": "nf4", "worst_of_allowed": 0}
    assert gpu.gather({"correctness": [done]})["correct"]
    assert not gpu.gather({"correctness": [done, {"piece": "rope", "late": True}]})["correct"]
    assert not gpu.gather({"correctness": [done, {"piece": "rope", "error": "x"}]})["correct"]
    assert gpu.gather({"correctness": []})["correct"] is False
    assert gpu.gather({"operators": []})["correct"] is None, "it was not asked for"


def test_the_sections_end_within_eight_minutes(gpu):
    assert set(gpu.ENDS) == set(gpu.SECTIONS)
    assert list(gpu.ENDS.values()) == sorted(gpu.ENDS.values())
    assert max(gpu.ENDS.values()) + gpu.GRACE < 8 * 60


@pytest.mark.parametrize("text", [None, "../kernels"])
def test_the_links_are_made_again(gpu, tmp_path, monkeypatch, text):
    """Missing, or a text file as git leaves one on a system without links."""
    for part in ("jindo_core", "kernels", "cli"):
        (tmp_path / part).mkdir()
    if text is not None:
        (tmp_path / "jindo_core" / "kernels").write_text(text)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    gpu.prepare()
    assert os.readlink(tmp_path / "jindo_core" / "kernels") == "../kernels"
    assert os.readlink(tmp_path / "jindo_core" / "cli") == "../cli"


def test_without_a_gpu_it_is_one_line_and_2(gpu, monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.startswith("error: got no CUDA device")


def test_the_tolerances_are_the_tests_own(gpu):
    import torch

    table = importlib.import_module("bench.correctness").tolerances()
    assert table["nf4_dequantize"][torch.bfloat16] == 0
    assert table["rms_norm"][torch.float16] == 1e-3
