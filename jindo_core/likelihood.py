"""Log-probabilities of given continuations: what multiple choice and perplexity are counted from.

    log p(c | x) = sum_t log softmax(W h_t)[c_t],    h_t from x and the tokens of c before the t-th

Only the positions of the continuations reach the head, a chunk of them at a time (`chunk_rows`), and the head's own
slices where it is streamed: neither the logits nor such a head is ever whole. Inputs that differ in their last token
alone (one-token answers to one question) are run once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from jindo_core.batch_generation import depends_on_padding
from jindo_core.causal_lm import CausalLM
from jindo_core.errors import InputError
from jindo_core.head import StreamedHead
from jindo_core.kernels.linear_cross_entropy import chunk_rows
from jindo_core.memory import is_out_of_memory
from jindo_core.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Request:
    """The probability of `continuation` behind `context`, both token ids and neither empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.context) + len(self.continuation)

    def input_ids(self, limit: int | None) -> tuple[int, ...]:
        """What the model reads: all but the last token, the first ones left out beyond `limit` (a model's context)."""
        ids = self.context + self.continuation[:-1]
        return ids if limit is None else ids[-limit:]


@dataclass(frozen=True, slots=True)
class Score:
    """log_probability: nats, summed over the continuation's tokens. greedy: whether each was the likeliest one."""

    log_probability: float
    greedy: bool


def encode_request(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """Both texts tokenized as one and parted where the context's own tokens end.

    Spaces at the context's end belong to the continuation, as tokenizers have them; a context without text is the
    token that begins a text, or ends one where there is none. The rule is lm-evaluation-harness'.

    Raises:
        InputError: no token is left for the continuation, or for an empty context.
    """
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    if bare:
        whole, before = tokenizer.encode(bare + continuation), tokenizer.encode(bare)
        rest = whole[len(before) :]
    else:
        start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        if start is None:
            raise InputError("the context is empty and the tokenizer has neither BOS nor EOS: expected some text in it")
        before, rest = [start], tokenizer.encode(continuation, bos=False)
    if not rest:
        raise InputError(f"the continuation {continuation!r} has no token of its own: expected text behind the context")
    return Request(tuple(before), tuple(rest))


def batches(requests: Sequence[Request], batch_size: int, model: CausalLM) -> list[list[int]]:
    """Indices of `requests` in batches of at most `batch_size` different inputs, the longest first.

    Alike lengths are together, so that little padding is computed, and memory runs out at once or never. The batches
    depend on nothing else: a run that is taken up again has the same ones.

    Raises:
        InputError: a continuation is longer than the model's context.
    """
    limit = model.config.context
    for request in requests:
        if limit is not None and len(request.continuation) > limit:
            raise InputError(
                f"a continuation has {len(request.continuation)} tokens, the model's context {limit}: expected fewer"
            )
    inputs = [request.input_ids(limit) for request in requests]
    order = sorted(range(len(requests)), key=lambda i: (-len(inputs[i]), inputs[i]))
    found: list[list[int]] = []
    rows, length = batch_size, 0
    for ids, same in groupby(order, key=lambda i: inputs[i]):
        if rows == batch_size or (depends_on_padding(model) and len(ids) != length):
            found.append([])
            rows, length = 0, len(ids)
        found[-1] += same
        rows += 1
    return found


@torch.no_grad()
def score(model: CausalLM, requests: Sequence[Request], *, pad_id: int) -> list[Score]:
    """The requests' scores, all in one batch; in halves where memory runs out, and apart where padding would tell.

    A request that is longer than the model's context loses its first tokens. Dropout is off, and the model's mode
    afterwards as it was.
    """
    was_training = model.training
    model.eval()
    lengths = [len(request.input_ids(model.config.context)) for request in requests]
    # Equal lengths need no padding; else all are one group.
    keys = lengths if depends_on_padding(model) else [0] * len(requests)
    found: dict[int, Score] = {}
    try:
        for key in dict.fromkeys(keys):
            group = [i for i, own in enumerate(keys) if own == key]
            found.update(zip(group, _halving(model, [requests[i] for i in group], pad_id), strict=True))
        return [found[i] for i in range(len(requests))]
    finally:
        model.train(was_training)


def _halving(model: CausalLM, requests: Sequence[Request], pad_id: int) -> list[Score]:
    try:
        return _score(model, requests, pad_id)
    except (RuntimeError, MemoryError) as error:
        if len(requests) < 2 or not is_out_of_memory(error):
            raise
    # Outside the handler: its traceback holds on to the tensors that took the room.
    half = len(requests) // 2
    return _halving(model, requests[:half], pad_id) + _halving(model, requests[half:], pad_id)


def _score(model: CausalLM, requests: Sequence[Request], pad_id: int) -> list[Score]:
    limit = model.config.context
    inputs = [request.input_ids(limit) for request in requests]
    row_of = {ids: row for row, ids in enumerate(dict.fromkeys(inputs))}
    padded = torch.full((len(row_of), max(map(len, row_of))), pad_id)
    for ids, row in row_of.items():
        padded[row, : len(ids)] = torch.tensor(ids)
    # Right padding: a causal token never sees it.
    hidden = model.stack(padded.to(model.device))
    rows: list[int] = []
    places: list[int] = []
    targets: list[int] = []
    for request, ids in zip(requests, inputs, strict=True):
        count = len(request.continuation)
        rows += [row_of[ids]] * count
        places += range(len(ids) - count, len(ids))
        targets += request.continuation
    wanted = hidden[torch.tensor(rows, device=hidden.device), torch.tensor(places, device=hidden.device)]
    log_probability, likeliest = token_log_probabilities(wanted, model.lm_head, torch.tensor(targets).to(wanted.device))
    sizes = [len(request.continuation) for request in requests]
    sums = [part.double().sum() for part in log_probability.cpu().split(sizes)]
    greedy = [bool(part.all()) for part in likeliest.cpu().split(sizes)]
    return [Score(float(total), right) for total, right in zip(sums, greedy, strict=True)]


def token_log_probabilities(hidden: Tensor, head: nn.Linear | StreamedHead, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of each position its target's log-probability, and whether no other token was likelier.

    Args:
        hidden: [M, C]. head: y = x W^T, W [V, C]. targets: int64 [M].
    Returns:
        fp32 [M] (fp64 for fp64 input), bool [M]; of equal logits the one with the smaller id counts as the likeliest.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    log_sum = hidden.new_full(targets.shape, -math.inf, dtype=wide)
    own, largest, where = torch.zeros_like(log_sum), log_sum.clone(), torch.zeros_like(targets)
    start = 0
    for weight in _slices(head):
        for first in range(0, len(hidden), step := chunk_rows(len(weight))):
            part = slice(first, first + step)
            logits = (hidden[part] @ weight.t()).to(wide)
            log_sum[part] = torch.logaddexp(log_sum[part], logits.logsumexp(1))
            top, place = logits.max(1)
            place = torch.where(top > largest[part], place + start, where[part])
            where[part], largest[part] = place, torch.maximum(largest[part], top)
            local = targets[part] - start
            found = logits.gather(1, local.clamp(0, len(weight) - 1)[:, None])[:, 0]
            own[part] = torch.where((local >= 0) & (local < len(weight)), found, own[part])
            del logits
        start += len(weight)
    return own - log_sum, where == targets


def _slices(head: nn.Linear | StreamedHead) -> Iterator[Tensor]:
    return head.slices() if isinstance(head, StreamedHead) else iter((head.weight,))
