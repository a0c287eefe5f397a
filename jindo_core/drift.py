"""How far a merged model is from the adapter on NF4 that was trained, on held-out text.

The models are run a layer at a time: a layer's weights are read as its turn comes and let go of after it, so that a
model is measured which would not fit in memory. The arithmetic is fp32 throughout: what differs is the weights alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jindo_core.adapters import Adapter
from jindo_core.architectures import build
from jindo_core.causal_lm import CausalLM
from jindo_core.data.examples import IGNORE, Example, collate, encode_all
from jindo_core.data.records import bundled_path, read_records, split_records
from jindo_core.data.templates import load_template
from jindo_core.errors import InputError
from jindo_core.hub import resolve_data
from jindo_core.lora import LoraLinear
from jindo_core.merge import MergedCheckpoint
from jindo_core.nf4 import NF4Linear
from jindo_core.run_record import RunRecord
from jindo_core.tokenizer import Tokenizer

TRAINED = "adapter on NF4, as trained"
_POSITIONS = 256
"""Positions whose logits are made at once."""


@dataclass(frozen=True)
class Drift:
    """A model beside the one that was trained.

    Attributes:
        loss: mean cross entropy over the supervised tokens, nats.
        divergence: mean KL(trained || this), nats a token. largest: the largest difference of a logit.
    """

    model: str
    loss: float
    divergence: float
    largest: float


def measure_drift(
    merged: dict[str, MergedCheckpoint],
    trained: MergedCheckpoint,
    adapter: Adapter,
    examples: Sequence[Example],
    pad_id: int,
    device: torch.device,
    on_layer: Callable[[], None] = lambda: None,
) -> list[Drift]:
    """The loss of every model, and its distance from the first row's, which is the adapter on NF4.

    Args:
        merged: {what it is called: a merged model}. trained: the base in NF4, without the adapter.
        examples: held-out rows, run as one batch.
        on_layer: called after each layer of each model, (1 + len(merged)) * layers times.
    """
    with torch.device("meta"):
        model = build(trained.config).requires_grad_(False).eval()
    batch = collate(examples, pad_id)
    ids, labels = batch["input_ids"].to(device), batch["labels"].to(device)
    counted = labels[:, 1:] != IGNORE
    targets = labels[:, 1:][counted]
    linears: dict[str, Callable[[str, nn.Linear], nn.Module]] = {
        TRAINED: lambda path, meta: _trained_linear(trained, adapter, path, meta, device),
        **{name: _whole_linear(source, device) for name, source in merged.items()},
    }
    hidden = {}
    with torch.no_grad():
        for name, linear in linears.items():
            source = merged.get(name, trained)
            read = _read_saved(adapter, source) if name == TRAINED else source.read
            hidden[name] = _hidden_states(model, read, linear, ids, device, on_layer)[:, :-1][counted]
        head = "lm_head" if not trained.config.tie_word_embeddings else model.EMBEDDING
        weight = _read_saved(adapter, trained)(f"{head}.weight").to(device, torch.float32)
        rows = []
        for name, states in hidden.items():
            # A head that the adapter brings is rounded in the merged models.
            differs = name != TRAINED and head in adapter.saved
            own = merged[name].read(f"{head}.weight").to(device, torch.float32) if differs else weight
            rows.append(_compare(name, (states, own), (hidden[TRAINED], weight), targets))
        return rows


def _read_saved(adapter: Adapter, source: MergedCheckpoint) -> Callable[[str], Tensor]:
    """Reads the base's weights, or the adapter's where it brings its own embedding or head."""

    def read(name: str) -> Tensor:
        saved = adapter.saved.get(name.removesuffix(".weight"))
        return source.read(name) if saved is None else saved

    return read


def _compare(name: str, model: tuple[Tensor, Tensor], trained: tuple[Tensor, Tensor], targets: Tensor) -> Drift:
    """Hidden states [n, C] and heads [V, C] of two models -> their distance, a chunk of logits [256, V] at a time."""
    loss = divergence = largest = 0.0
    for start in range(0, len(targets), _POSITIONS):
        chunk = slice(start, start + _POSITIONS)
        ours, theirs = (F.linear(states[chunk], head) for states, head in (model, trained))
        loss += F.cross_entropy(ours, targets[chunk], reduction="sum").item()
        logs = theirs.log_softmax(-1)
        divergence += F.kl_div(ours.log_softmax(-1), logs, reduction="sum", log_target=True).item()
        largest = max(largest, (ours - theirs).abs().max().item())
    return Drift(name, loss / len(targets), max(divergence / len(targets), 0.0), largest)


def _hidden_states(
    model: CausalLM,
    read: Callable[[str], Tensor],
    linear: Callable[[str, nn.Linear], nn.Module],
    ids: Tensor,
    device: torch.device,
    on_layer: Callable[[], None],
) -> Tensor:
    """[B, T] -> [B, T, C], fp32.

    Args:
        model: of placeholders, whose layers are that again afterwards. read: a weight by its name.
        linear: makes a layer's linear module from its path and placeholder.
    """
    root = model.LAYERS.rpartition(".")[0]

    def fill(path: str, part: nn.Module) -> None:
        """Read a module's own parameters, which are no linear layer's."""
        for name in list(part._parameters):
            value = read(f"{path}.{name}").to(device, torch.float32)
            setattr(part, name, nn.Parameter(value, requires_grad=False))

    def load(prefix: str) -> Callable[..., None]:
        def hook(layer: nn.Module, *_: Any) -> None:
            for path, part in list(layer.named_modules()):
                if isinstance(part, nn.Linear):
                    layer.set_submodule(path, linear(f"{prefix}.{path}", part).eval())
                else:
                    fill(".".join(filter(None, (prefix, path))), part)

        return hook

    def drop(layer: nn.Module) -> Callable[..., None]:
        empty = {path: part for path, part in layer.named_modules() if isinstance(part, nn.Linear)}

        def hook(*_: Any) -> None:
            for path, part in empty.items():
                layer.set_submodule(path, part)
            layer.to_empty(device="meta")
            on_layer()

        return hook

    for path, part in model.stack.named_modules(prefix=root):
        if not path.startswith(f"{model.LAYERS}."):
            fill(path, part)
    hooks = []
    for i, layer in enumerate(model.stack.layers):
        hooks.append(layer.register_forward_pre_hook(load(f"{model.LAYERS}.{i}")))
        hooks.append(layer.register_forward_hook(drop(layer)))
    hidden: Tensor = model.stack(ids)
    for hook in hooks:
        hook.remove()
    return hidden


def _whole_linear(source: MergedCheckpoint, device: torch.device) -> Callable[[str, nn.Linear], nn.Linear]:
    def make(path: str, meta: nn.Linear) -> nn.Linear:
        full = nn.Linear(meta.in_features, meta.out_features, bias=meta.bias is not None, device="meta")
        for name in dict(full.named_parameters()):
            value = source.read(f"{path}.{name}").to(device, torch.float32)
            setattr(full, name, nn.Parameter(value, requires_grad=False))
        return full

    return make


def _trained_linear(
    source: MergedCheckpoint, adapter: Adapter, path: str, meta: nn.Linear, device: torch.device
) -> nn.Module:
    """The layer as training had it: NF4, or whole where the base's own files leave it so, and the adapter's matrices
    beside it."""
    if f"{path}.weight" in source.nf4_names:
        bias = None if meta.bias is None else source.read(f"{path}.bias").to(device, torch.float32)
        base: nn.Linear = NF4Linear(source.quantize(f"{path}.weight").to(device), bias)
    else:
        base = _whole_linear(source, device)(path, meta)
    if path not in adapter.pairs:
        return base
    a, b = adapter.pairs[path]
    layer = LoraLinear(base, a.shape[0], adapter.alpha, use_rslora=adapter.use_rslora, device=device)
    layer.lora_A.copy_(a)
    layer.lora_B.copy_(b)
    return layer


# --- the text -------------------------------------------------------------------------------------------


def held_out_examples(
    eval_text: str | None, run: RunRecord | None, tokenizer: Tokenizer, rows: int, cutoff: int
) -> tuple[list[Example], str]:
    """Rows to measure on, and what they are in words.

    Args:
        eval_text: a .json or .jsonl file of instructions, or any other file as plain text; None: the rows that the
            training run held out, or for an adapter without a record of its run some of the bundled Korean ones.
        rows: at most so many. cutoff: tokens a row, at most.
    Raises:
        InputError: the file can't be read or holds nothing to measure on, or the run's data is gone.
    """
    if eval_text is not None and Path(eval_text).suffix not in (".json", ".jsonl"):
        return _plain_text(Path(eval_text), tokenizer, rows, cutoff), f"{Path(eval_text).name}"
    settings = {} if run is None else run.settings
    if eval_text is not None:
        records, said = read_records(eval_text), f"rows of {Path(eval_text).name}"
    else:
        data = settings.get("data_path")
        data = [data] if isinstance(data, str) else data  # older runs wrote one path
        try:
            paths = [bundled_path()] if data is None else [resolve_data(path) for path in data]
            records = [record for path in paths for record in read_records(path)]
        except InputError as error:
            raise InputError(f"{error}; or give --eval_text FILE, or --eval_rows 0 to measure nothing") from None
        size = settings.get("val_set_size") or rows
        _, records, _ = split_records(records, size, settings.get("seed", 42))
        told = "rows held out" if settings.get("val_set_size") else "rows (perhaps trained on: its run held none out)"
        names = "the bundled Korean instructions" if data is None else ", ".join(Path(path).name for path in data)
        said = f"{told} of {names}"
    template = load_template("alpaca" if run is None else run.prompt_template_name, tokenizer)
    whole = bool(settings.get("train_on_inputs", False))  # as the run's own loss counted
    examples, _ = encode_all(records[:rows], tokenizer, template, cutoff_len=cutoff, train_on_inputs=whole)
    if not examples:
        raise InputError(f"{said}: no row has an answer within {cutoff} tokens: give another --eval_text")
    return examples, f"{len(examples)} {said}"


def _plain_text(file: Path, tokenizer: Tokenizer, rows: int, cutoff: int) -> list[Example]:
    try:
        text = file.expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"eval_text {file}: got '{error.strerror}', expected a readable file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"eval_text {file}: got a byte at offset {error.start} that is no UTF-8") from None
    ids = tokenizer.encode(text)
    pieces = [ids[i : i + cutoff] for i in range(0, len(ids), cutoff)][:rows]
    examples = [Example(piece, piece) for piece in pieces if len(piece) > 1]
    if not examples:
        raise InputError(f"eval_text {file} holds no text: expected at least two tokens")
    return examples
