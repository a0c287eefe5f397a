"""Every example runs and does what its first line says."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from jindo_core.config import resolve_train_config
from jindo_core.train import train


@pytest.fixture
def example(repo_root, monkeypatch):
    """example("peft_lora"): the module, not yet run."""
    from jindo_core.integrations.transformers import _say

    _say.cache_clear()

    def load(name):
        spec = importlib.util.spec_from_file_location(f"example_{name}", repo_root / "examples" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def losses(text):
    return [float(found) for found in re.findall(r"loss (\d+\.\d+)", text)]


def test_there_is_a_test_for_each(repo_root):
    names = {path.stem for path in (repo_root / "examples").glob("*.py")}
    text = (repo_root / "tests" / "test_examples.py").read_text(encoding="utf-8")
    assert names
    assert not [name for name in names if f'"{name}' not in text]


def test_train_from_python(example, stories260k, tmp_path, capsys, monkeypatch):
    module = example("train_from_python")
    monkeypatch.setattr(module, "model_path", lambda: str(stories260k))  # in place of 135M weights
    module.main(str(tmp_path))
    found = losses(capsys.readouterr().out)
    assert len(found) == 20
    assert found[-1] < found[0]
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_transformers_nf4(example, tmp_path, capsys):
    example("transformers_nf4").main(str(tmp_path))
    said = capsys.readouterr().out
    assert "the same logits: True" in said
    numbers = re.search(r"([\d,]+) parameters in ([\d,]+) bytes", said).groups()
    parameters, held = (int(number.replace(",", "")) for number in numbers)
    assert held < parameters
    assert any(key.endswith("quant_state.bitsandbytes__nf4") for key in load_file(tmp_path / "model.safetensors"))


def test_bitsandbytes_code(example, capsys):
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    before = dict(AUTO_QUANTIZER_MAPPING)
    example("bitsandbytes_code").main()
    assert capsys.readouterr().out.startswith("NF4Linear")
    assert before == AUTO_QUANTIZER_MAPPING


def test_peft_lora(example, tmp_path, capsys):
    example("peft_lora").main(str(tmp_path))
    said = capsys.readouterr().out
    found = losses(said)
    assert found[-1] < found[0]
    assert 0 < float(re.search(r"moved by ([\d.]+)%", said).group(1)) < 30
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_hf_trainer(example, tmp_path, capsys):
    example("hf_trainer").main(str(tmp_path))
    assert re.search(r"step 8  loss 4\.\d", capsys.readouterr().out)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}


def test_trl_sft(example, tmp_path, capsys):
    example("trl_sft").main(str(tmp_path))
    first, last = re.search(r"loss ([\d.]+) -> ([\d.]+)", capsys.readouterr().out).groups()
    assert float(last) < float(first)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_plain_loop(example, capsys):
    example("plain_loop").main(compiled=False)  # compiling takes a C++ compiler half a minute; see test_patch.py
    found = losses(capsys.readouterr().out)
    assert found[-1] < found[0] / 2


@pytest.mark.slow
def test_plain_loop_compiled(example, capsys):
    module = example("plain_loop")
    module.main(compiled=False)
    plain = losses(capsys.readouterr().out)
    module.main()
    assert losses(capsys.readouterr().out) == pytest.approx(plain, abs=2e-3)


def test_lightning_module(example, tmp_path, capsys):
    example("lightning_module").main(str(tmp_path))
    assert re.search(r"step 8  loss 4\.\d", capsys.readouterr().out)
    checkpoint = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=False)
    state = checkpoint["state_dict"]
    assert "model.model.layers.0.mlp.up_proj.base.weight.quant_state.bitsandbytes__nf4" in state
    again = example("lightning_module").Adapted()
    again.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())


def test_fsdp2(repo_root, tmp_path):
    """As torchrun starts it: "fsdp2" on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command.append(str(repo_root / "examples" / "fsdp2.py"))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = losses(done.stdout)
    assert found[-1] < found[0]
    assert sorted(re.findall(r"rank (\d) holds 4,096 of 8,192 bytes", done.stdout)) == ["0", "1"]


@pytest.mark.slow
def test_dcp(repo_root, stories260k, tmp_path):
    """A run's checkpoint through torch.distributed.checkpoint: two ranks save, three load, every byte is there."""
    settings = resolve_train_config(
        {
            "base_model": str(stories260k), "output_dir": str(tmp_path / "out"), "max_steps": 2, "save_steps": 2,
            "batch_size": 2, "micro_batch_size": 2, "val_set_size": 0, "device": "cpu", "cutoff_len": 64, "lora_r": 2,
        }
    )  # fmt: skip
    train(*settings)
    saved = tmp_path / "out" / "checkpoint-2"
    for ranks, what, source, target in ((2, "save", saved, "dcp"), (3, "load", tmp_path / "dcp", "back")):
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command += [str(repo_root / "examples" / "dcp.py"), what, str(source), str(tmp_path / target)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        given, found = load_file(saved / file), load_file(tmp_path / "back" / file)
        assert given
        assert given.keys() == found.keys()
        assert {name: value.dtype for name, value in given.items()} == {n: value.dtype for n, value in found.items()}
        assert all(torch.equal(value, found[name]) for name, value in given.items())


def test_the_readme_s_library_example(repo_root, stories260k, tmp_path, capsys, monkeypatch):
    """As it is printed there, on another model."""
    text = (repo_root / "README.md").read_text(encoding="utf-8").split("As a library:")[1]
    code = text.split("```python\n")[1].split("```")[0]
    assert "./my-llama" in code
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("./my-llama", str(stories260k)), "README.md", "exec"), {})
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()
    assert capsys.readouterr().out.strip()
