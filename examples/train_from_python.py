"""Fine-tune the embedded SmolLM2-135M on a handful of rows from Python, without the command line.

    python examples/train_from_python.py my-adapter
"""

from __future__ import annotations

import sys

import torch

import jindo_core as jc

ROWS = [("하늘은 무슨 색인가요?", "하늘은 파란색이에요."), ("물은 몇 도에서 끓나요?", "물은 100도에서 끓어요.")]


def main(folder: str) -> None:
    torch.manual_seed(0)
    path = model_path()
    model, tokenizer = jc.load_model(path), jc.load_tokenizer(path)
    jc.attach_lora(model, r=8, alpha=16, target_modules="all-linear").train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for step in range(20):
        question, answer = ROWS[step % len(ROWS)]
        prompt, whole = tokenizer.encode(f"{question}\n→"), tokenizer.encode(f"{question}\n→ {answer}")
        ids = torch.tensor([[*whole, tokenizer.eos_id]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}  loss {loss.item():.3f}")
    jc.save_adapter(model, folder)
    print(jc.generate(model, tokenizer, f"{ROWS[0][0]}\n→", max_new_tokens=24))


def model_path() -> str:
    """The embedded model's file, fetched on first use; any LLaMA folder does as well."""
    from jindo_core.embedded import embedded_model

    return str(embedded_model())


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "my-adapter")
