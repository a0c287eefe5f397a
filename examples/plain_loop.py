"""A loop of your own around any model made of nn.Linear: NF4, LoRA and the paged optimizer, and torch.compile.

    python examples/plain_loop.py
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import jindo_core as jc


class Classifier(nn.Module):
    """Whatever you have."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)
        self.head = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.down(F.gelu(self.up(x))))


def main(compiled: bool = True) -> None:
    torch.manual_seed(0)
    model = jc.patch_model(Classifier(), skip=("head",))  # up and down in NF4, in place
    jc.attach_lora(model, r=8, alpha=16, target_modules=["up", "down"]).train()
    model.head.requires_grad_()
    run = torch.compile(model, fullgraph=True) if compiled else model  # one graph, forward and backward
    optimizer = jc.PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, state_bits=8)
    x = torch.randn(256, 64)
    labels = x[:, :4].argmax(-1)
    for step in range(20):
        loss = F.cross_entropy(run(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 4:
            print(f"step {step + 1}  loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
