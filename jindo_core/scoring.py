"""How likely a model finds the answers of training rows, with and without what they answer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jindo_core.batch_generation import depends_on_padding
from jindo_core.causal_lm import CausalLM
from jindo_core.data.examples import IGNORE, Example, collate
from jindo_core.errors import InputError
from jindo_core.head import StreamedHead
from jindo_core.kernels.linear_cross_entropy import linear_cross_entropy
from jindo_core.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Score:
    """A row's figures; losses in nats a token, over the same tokens.

    Attributes:
        tokens: supervised ones: the answers' and the EOS behind each.
        loss: their mean cross entropy given all that stands before them; minus it is the mean log-likelihood.
        loss_alone: given only the answer's own beginning.
    """

    tokens: int
    loss: float
    loss_alone: float

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is beyond a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def ifd(self) -> float:
        """Instruction-following difficulty, loss / loss_alone (Li et al. 2023, arXiv:2308.12032). Near 0: the prompt
        gives the answer away; 1 and above: it does not help, often because the two don't belong together."""
        if self.loss_alone == 0:
            return 1.0 if self.loss == 0 else math.inf
        return self.loss / self.loss_alone


def score(model: CausalLM, tokenizer: Tokenizer, examples: Sequence[Example], *, batch_size: int) -> list[Score]:
    """Score rows, in their order. Each example has a supervised token behind its first.

    An answer alone is its own tokens behind BOS, or EOS where the tokenizer has no BOS: its first token has to follow
    something. Answers of a conversation stand alone one by one.

    Raises:
        InputError: a tokenizer with neither.
    """
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if first is None:
        raise InputError("this tokenizer has neither BOS nor EOS: expected one, for an answer alone to begin with")
    alone, owners = [], []
    for row, example in enumerate(examples):
        for answer in _answers(example):
            alone.append(Example([first, *answer], [IGNORE, *answer]))
            owners.append(row)
    together = answer_losses(model, examples, batch_size=batch_size, pad_id=tokenizer.pad_id)
    apart = [0.0] * len(examples)
    parts = answer_losses(model, alone, batch_size=batch_size, pad_id=tokenizer.pad_id)
    for row, (total, _) in zip(owners, parts, strict=True):
        apart[row] += total
    return [Score(count, total / count, single / count) for (total, count), single in zip(together, apart, strict=True)]


def _answers(example: Example) -> Iterator[list[int]]:
    """The stretches of supervised tokens; the first token of all, which nothing predicts, is in none."""
    answer: list[int] = []
    for label in (*example.labels[1:], IGNORE):
        if label != IGNORE:
            answer.append(label)
        elif answer:
            yield answer
            answer = []


@torch.no_grad()
def answer_losses(
    model: CausalLM, examples: Sequence[Example], *, batch_size: int, pad_id: int
) -> list[tuple[float, int]]:
    """Each example's summed cross entropy (nats) over its supervised tokens, and their number, in the examples' order.

    The logits are never whole; dropout is off. A model that padding would change takes one row at a time.
    """
    results: list[tuple[float, int]] = [(0.0, 0)] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
    multiple_of = 8
    if depends_on_padding(model):
        batch_size, multiple_of = 1, 1
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = collate([examples[i] for i in rows], pad_id, multiple_of=multiple_of)
            hidden = model.stack(batch["input_ids"].to(model.device))
            for i, own, labels in zip(rows, hidden, batch["labels"], strict=True):
                places = (labels[1:] != IGNORE).nonzero()[:, 0]
                wanted = labels[places + 1].to(model.device)
                results[i] = (_summed(model, own[places.to(own.device)], wanted), len(places))
    finally:
        model.train(was_training)
    return results


def _summed(model: CausalLM, hidden: Tensor, wanted: Tensor) -> float:
    """The summed cross entropy of hidden [N, C] against ids [N]."""
    if not len(wanted):
        return 0.0
    if isinstance(model.lm_head, StreamedHead):
        return float(model.lm_head.loss(hidden, wanted, 1.0))
    return float(linear_cross_entropy(hidden, model.lm_head.weight, wanted, count=1.0))
