"""An exported GGUF in llama.cpp itself. Runs where llama-cpp-python is installed: `pytest -m slow` on this file."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from jindo_core.convert import run_export
from jindo_core.convert_config import ExportConfig
from jindo_core.generation import generate_ids
from jindo_core.loader import load_model
from jindo_core.tokenizer import load_tokenizer

TEXTS = ("Once upon a time", "The dog, 안녕하세요 and 12345\n", "")
CLOSE = {"f32": 0.05, "f16": 0.05, "bf16": 0.2, "q8_0": 1.5}
"""Logits. llama.cpp keeps keys and values in fp16, and rounds activations to bf16 or 8 bits beside such weights."""
NEW = 40
WINDOW = 7


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("name", ["stories260K-hf", "stories15M-hf"])
def test_greedy_text_equals_ours(assets, tmp_path, name, dtype):
    """The same ids for the same text, the same greedy continuation, and with fp32 weights the same logits."""
    llama_cpp = pytest.importorskip("llama_cpp")
    base = assets / "models" / name
    file = tmp_path / "model.gguf"
    values = {"format": "gguf", "dtype": dtype, "device": "cpu", "output_file": str(file)}
    run_export(ExportConfig(base_model=str(base), **values))
    tokenizer = load_tokenizer(base)
    ours = load_model(file, quantize=None, dtype="fp32", device="cpu")
    theirs = llama_cpp.Llama(str(file), n_ctx=128, n_threads=1, verbose=False, logits_all=True)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert theirs.tokenize(text.encode(), add_bos=True) == ids
        theirs.reset()
        theirs.eval(ids)
        with torch.no_grad():
            logits = ours(torch.tensor([ids])).logits[0]
        difference = (torch.from_numpy(theirs.scores[: len(ids)]) - logits).abs().max()
        assert difference < CLOSE[dtype]
        if dtype in ("bf16", "q8_0") and text != TEXTS[0]:
            continue  # far from the stories it was trained on, two tokens are often within that rounding
        continued = []
        for _ in range(NEW):
            continued.append(int(theirs.scores[theirs.n_tokens - 1].argmax()))
            if continued[-1] == tokenizer.eos_id:
                break
            theirs.eval(continued[-1:])
        expected = list(generate_ids(ours, ids, max_new_tokens=NEW, stop_ids=frozenset({tokenizer.eos_id})))
        assert continued == expected


@pytest.mark.slow
@pytest.mark.parametrize("theirs", [Qwen2Config, MistralConfig, LlamaConfig], ids=lambda kind: kind.model_type)
def test_logits_of_the_families(stories260k, tmp_path, theirs):
    """Random models: a Qwen2's biases and row order, a LLaMA's biases, and that a Mistral's window is not seen."""
    llama_cpp = pytest.importorskip("llama_cpp")
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
    more = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    extra = {"mistral": {"sliding_window": WINDOW}, "llama": {"attention_bias": True, "mlp_bias": True}, "qwen2": {}}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(theirs(**sizes, **more, **extra[theirs.model_type]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.1))
    base, file = tmp_path / "base", tmp_path / "model.gguf"
    model.save_pretrained(base)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(stories260k / name, base / name)
    values = {"format": "gguf", "dtype": "f32", "device": "cpu", "output_file": str(file)}
    run_export(ExportConfig(base_model=str(base), **values))
    ids = torch.randint(3, 512, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = load_model(file, quantize=None, dtype="fp32", device="cpu")(ids).logits[0]
    reader = llama_cpp.Llama(str(file), n_ctx=128, n_threads=1, verbose=False, logits_all=True)
    reader.eval(ids[0].tolist())
    difference = (torch.from_numpy(reader.scores[:40]) - logits).abs().amax(-1)
    assert logits.std() > 0.5
    assert difference[:WINDOW].max() < CLOSE["f32"]
    assert (difference.max() < CLOSE["f32"]) == (theirs.model_type != "mistral")
