"""Loss on held-out examples."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from jindo_core.causal_lm import CausalLM
from jindo_core.data.examples import IGNORE, Example, collate
from jindo_core.data.store import Selection
from jindo_core.parallel import ALONE, Ranks


@torch.no_grad()
def held_out_loss(model: CausalLM, examples: Sequence[Example], *, batch_size: int, pad_id: int) -> float:
    """Mean cross entropy over the supervised tokens of all examples, dropout off.

    Every token weighs the same, whatever the batch it is in. NaN when there are no examples.
    """
    total, count = held_out_sums(model, examples, batch_size=batch_size, pad_id=pad_id)
    return total / count if count else float("nan")


@torch.no_grad()
def held_out_sums(
    model: CausalLM, examples: Sequence[Example], *, batch_size: int, pad_id: int, ranks: Ranks = ALONE
) -> tuple[float, int]:
    """(the summed cross entropy, the supervised tokens) of this rank's part of the examples, dropout off."""
    was_training = model.training
    model.eval()
    try:
        return _summed(model, examples, batch_size, pad_id, ranks)
    finally:  # out of memory, say: what is tried again must find the model as it was
        model.train(was_training)


def _summed(
    model: CausalLM, examples: Sequence[Example], batch_size: int, pad_id: int, ranks: Ranks
) -> tuple[float, int]:
    total, count = 0.0, 0
    # Alike lengths together: the mean does not depend on the order, and less padding is computed.
    lengths = examples.lengths if isinstance(examples, Selection) else [len(one.input_ids) for one in examples]
    order = sorted(range(len(examples)), key=lambda i: int(lengths[i]))
    for chosen in ranks.deal([order[i : i + batch_size] for i in range(0, len(order), batch_size)]):
        batch = collate([examples[i] for i in chosen or order[:1]], pad_id)
        if not chosen:  # beside the other ranks' batches: counts for nothing
            batch["labels"].fill_(IGNORE)
        labels = batch["labels"].to(model.device)
        loss = model(batch["input_ids"].to(model.device), labels=labels, num_items_in_batch=1).loss
        assert loss is not None
        total += loss.item()
        count += int((batch["labels"][:, 1:] != -100).sum())
    return total, count
