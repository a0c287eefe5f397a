"""An exported GGUF in llama.cpp itself. Runs where llama-cpp-python is installed: `pytest -m slow` on this file."""

from __future__ import annotations

import pytest
import torch

from jindo_core.convert import run_export
from jindo_core.convert_config import ExportConfig
from jindo_core.generation import generate_ids
from jindo_core.loader import load_model
from jindo_core.tokenizer import load_tokenizer

TEXTS = ("Once upon a time", "The dog, 안녕하세요 and 12345\n", "")
CLOSE = {"f32": 0.05, "f16": 0.05, "bf16": 0.2, "q8_0": 1.5}
"""Logits. llama.cpp keeps keys and values in fp16, and rounds activations to bf16 or 8 bits beside such weights."""
NEW = 40


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
