"""Text from a model: prefill, then one token at a time with a key/value cache."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jindo_core.causal_lm import CausalLM, KVCache
from jindo_core.decoding import Decoder
from jindo_core.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from jindo_core.config import GenerateConfig
    from jindo_core.tokenizer import Tokenizer


def generate(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    ends: frozenset[int] = frozenset(),
    on_text: Callable[[str], None] | None = None,
) -> str:
    """Continue `prompt`: text as the tokenizer takes it, special tokens' names included, or ids as they are.

    Args:
        max_new_tokens: tokens at most; less where the model's context ends or it says EOS.
        temperature: 0 is greedy; else logits are divided by it before sampling.
        top_k: sample among the k likeliest (0: all). top_p: among the likeliest that hold that much
            probability (Holtzman et al. 2020, arXiv:1904.09751).
        seed: of the sampling; None draws on torch's generator.
        ends: ids that end the text, beside the model's own (`data.examples.end_ids` of a template).
        on_text: called with each piece of text as soon as it is certain.
    Returns:
        The new text, without the prompt and without special tokens.
    Raises:
        InputError: an empty prompt, or one that leaves no room in the model's context.
    """
    from jindo_core.tokenizer import StreamDecoder

    decoder, pieces = StreamDecoder(tokenizer), []
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    stops = stop_ids(model, tokenizer) | ends
    tokens = generate_ids(
        model, ids, max_new_tokens=max_new_tokens, stop_ids=stops, temperature=temperature, top_p=top_p, top_k=top_k,
        seed=seed,
    )  # fmt: skip
    for token in tokens:
        if token not in stops:
            pieces.append(decoder.push(token))
            if on_text is not None and pieces[-1]:
                on_text(pieces[-1])
    pieces.append(decoder.flush())
    if on_text is not None and pieces[-1]:
        on_text(pieces[-1])
    return "".join(pieces)


def stop_ids(model: CausalLM, tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end a text: the tokenizer's EOS, and those that the model's configuration names."""
    own = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    return frozenset((*own, *model.config.eos_token_ids))


@torch.no_grad()
def generate_ids(
    model: CausalLM,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
) -> Iterator[int]:
    """Yield new token ids, a stop id last; arguments as in `generate`."""
    context = model.config.context
    if not ids:
        raise InputError("the prompt is empty: expected at least one token")
    if context is not None and len(ids) >= context:
        raise InputError(f"the prompt is {len(ids)} tokens long, the model's context {context}: shorten it")
    room = max_new_tokens if context is None else min(max_new_tokens, context - len(ids))
    was_training = model.training
    model.eval()
    try:
        generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
        cache = KVCache(model.config, 1, len(ids) + room, model.dtype, model.device)
        prompt = torch.tensor([list(ids)], device=model.device)
        logits = model.lm_head(model.stack(prompt, cache=cache)[:, -1]).float()
        decoder = Decoder(model, cache)
        for made in range(1, room + 1):
            token = pick_token(logits[0], temperature, top_p, top_k, generator)
            yield token
            if token in stop_ids or made == room:
                return
            logits = decoder(torch.tensor([token], device=model.device))
    finally:
        model.train(was_training)


def pick_token(
    logits: Tensor, temperature: float, top_p: float, top_k: int, generator: torch.Generator | None
) -> int:
    """One token id from fp32 logits [V]."""
    if temperature <= 0:
        return int(logits.argmax())
    probability, order = torch.softmax(logits / temperature, dim=-1).sort(descending=True)
    if top_k > 0:
        probability[top_k:] = 0
    if top_p < 1:
        # A token stays while those before it hold less than top_p: the likeliest always does.
        before = probability.cumsum(0) - probability
        probability[before >= top_p * probability.sum()] = 0
    return int(order[torch.multinomial(probability, 1, generator=generator)])


def run_generate(config: GenerateConfig) -> str:
    """The `generate` command: load, build the prompt, write the answer to standard output as it comes.

    Without a base model or a template in `config`, those of the adapter's training run serve.
    """
    from rich.console import Console

    from jindo_core.data.examples import end_ids, prompt_ids
    from jindo_core.data.records import Record, Round
    from jindo_core.data.templates import load_template
    from jindo_core.hub import resolve_model
    from jindo_core.run_record import base_and_run
    from jindo_core.tokenizer import load_tokenizer

    if config.instruction is None:
        raise InputError("there is no instruction: expected --instruction TEXT or text on standard input")
    base, run = base_and_run(config.base_model, config.lora_weights)
    console = Console(stderr=True)  # standard output is the answer's
    if config.load_8bit and config.quantize == "nf4":
        console.print("note: --load_8bit: 8-bit weights are served by NF4, which takes half the memory")
    template_name = config.prompt_template_name or (run.prompt_template_name if run else "alpaca")
    path = resolve_model(base)
    tokenizer = load_tokenizer(path)
    template = load_template(template_name, tokenizer)
    asked = Record((Round(config.instruction, config.input or ""),), system=config.system or "", row=1)
    prompt = prompt_ids(tokenizer, template, asked)
    model = _load(config, path, tokenizer, console)

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    answer = generate(
        model, tokenizer, prompt, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
        top_p=config.top_p, top_k=config.top_k, seed=config.seed, ends=end_ids(tokenizer, template),
        on_text=show if config.stream else None,
    )  # fmt: skip
    show("\n" if config.stream else answer + "\n")
    return answer


def _load(config: GenerateConfig, path: Path, tokenizer: Tokenizer, console: Console) -> CausalLM:
    """The model at `path`, with its adapter."""
    from jindo_core.adapters import load_adapter
    from jindo_core.loader import load_model
    from jindo_core.pages import PageStore
    from jindo_core.progress import loading_bar

    if config.offload_folder is not None:
        PageStore(config.offload_folder).close()  # one that can't be written to is an error before anything is loaded
    with loading_bar(console) as on_progress:
        model = load_model(
            path, quantize=config.quantize, double_quant=config.double_quant, dtype=config.dtype,
            device=config.device, offload_layers=config.offload_layers, offload_embedding=config.offload_embedding,
            offload_head=config.offload_head, offload_folder=config.offload_folder or "host", on_progress=on_progress,
        )  # fmt: skip
    if config.offload_embedding and model.config.tie_word_embeddings and not config.offload_head:
        console.print(
            "note: --offload_embedding has no effect: this model's embedding is its head (--offload_head moves both)"
        )
    tokenizer.check(model.config.vocab_size)
    if config.lora_weights is not None:
        load_adapter(model, config.lora_weights)
    return model
