"""The jobs of `quantize`, `merge` and `export`: a checkpoint read and another written, a tensor at a time.

Each is written into a folder beside its target, brought to the disk, read back and compared, and only then takes the
target's place (`files.staged`). The peak is one tensor and what is made of it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jindo_core.adapters import Adapter, read_adapter
from jindo_core.convert_config import ExportConfig, MergeConfig, QuantizeConfig
from jindo_core.drift import TRAINED, held_out_examples, measure_drift
from jindo_core.errors import InputError
from jindo_core.files import read_bytes, staged, sync_folder
from jindo_core.formats import Checkpoint, open_checkpoint
from jindo_core.formats.gguf_tokenizer import tokenizer_fields
from jindo_core.formats.gguf_writer import model_fields, stored_tensors, verify_gguf, write_gguf
from jindo_core.formats.hf_config import hf_config, nf4_config, require_bitsandbytes
from jindo_core.formats.meta import PARAMS
from jindo_core.formats.meta_writer import WEIGHTS, meta_params, verify_pth, write_pth
from jindo_core.formats.names import qk_to_pairs, rename
from jindo_core.formats.safetensors_writer import SafetensorsWriter, verify_safetensors
from jindo_core.hub import resolve_model
from jindo_core.loader import build_empty, pick_device
from jindo_core.merge import MergedCheckpoint, Onto
from jindo_core.nf4 import STATE_KEY, is_finite
from jindo_core.progress import ConversionView, typed
from jindo_core.run_record import RunRecord, base_and_run
from jindo_core.settings import size_in_bytes
from jindo_core.tokenizer import load_tokenizer

SIDE_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""What belongs to a model beside its weights and configuration, and goes along unchanged; also its own code (*.py), as
LongLLaMA and the first Falcons have."""

_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
_MARKS = ("config.json", PARAMS)
_SPARE = 1_000_000  # bytes for headers and indices, beyond tensors and side files
_STATE_ROOM = 320  # bytes of a quant_state, whose numbers vary in length


@dataclass(frozen=True)
class Source:
    """A model that is read: where it lies, its weights' names in order, {path: (N, K)} of what NF4 quantizes, and the
    name of its input embedding."""

    path: Path
    checkpoint: Checkpoint
    names: list[str]
    linears: dict[str, tuple[int, int]]
    embedding: str


def open_source(base_model: str | None) -> Source:
    """Open a model and see that it is whole, without reading its weights. Raises InputError."""
    path = resolve_model(base_model)
    checkpoint = open_checkpoint(path)
    model = build_empty(checkpoint, path)
    linears = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.lm_head
    }
    names = [name for name, _ in model.named_parameters()]
    return Source(path, checkpoint, names, linears, f"{model.EMBEDDING}.weight")


def run_quantize(config: QuantizeConfig) -> Path:
    """The `quantize` command: the layers' linear weights in NF4, everything else as it is.

    Returns:
        The folder: config.json that transformers loads through bitsandbytes (a Falcon's through our integration),
        safetensors under bitsandbytes' keys, tokenizer files.
    Raises:
        InputError: what is wrong with the model or the target, or a Falcon for bitsandbytes; the target is as it was
            then.
    """
    begun, view, device = time.monotonic(), ConversionView(), pick_device(config.device)
    source = open_source(config.base_model)
    if config.format == "bitsandbytes":
        require_bitsandbytes(source.checkpoint.config)
    target = _target(config.output_dir, source.path)
    if source.checkpoint.quantized:
        view.say(f"note: {source.path.name} holds NF4 already: its bytes are taken as they are")
    if any(source.checkpoint.dtype_of(name) == torch.float64 for name in source.names):
        view.say(f"note: {source.path.name} holds float64: it is written in float32")
    quantized = MergedCheckpoint(
        source.checkpoint, None, "nf4", source.linears, double_quant=config.double_quant, device=device
    )
    sizes: dict[str, int] = {}
    for name in source.names:
        sizes |= _quantized_sizes(source, quantized, name, config.double_quant)
    needs = sum(sizes.values()) + _side_bytes(source.path)
    shard = size_in_bytes(config.max_shard_size)
    assert shard is not None
    with staged(target, overwrite=config.overwrite, needs=needs, marks=_MARKS) as folder:
        checksums = config.format == "jindo"
        with (
            view.bar("quantizing", sum(quantized.nbytes_of(name) for name in source.names)) as advance,
            SafetensorsWriter(folder, sizes, shard, checksums=checksums) as writer,
        ):
            for name in source.names:
                for part, value in _quantized_parts(source, quantized, name).items():
                    writer.write(part, value)
                advance(quantized.nbytes_of(name))
        _write_json(folder / "config.json", _quantized_config(source, quantized, sizes))
        _copy_side_files(source.path, folder)
        sync_folder(folder)
        verify_safetensors(writer.written)
        _same_shapes(open_checkpoint(folder), source)
    _done(view, target, begun)
    return target


def _quantized_sizes(source: Source, quantized: MergedCheckpoint, name: str, double_quant: bool) -> dict[str, int]:
    """{tensor: bytes, or a bound} of what becomes of a weight."""
    if name not in quantized.nf4_names:
        return {name: math.prod(quantized.shapes[name]) * _narrowed(quantized.dtype_of(name)).itemsize}
    if name in source.checkpoint.quantized:
        return {part: value.nbytes for part, value in source.checkpoint.read_nf4(name).state_dict(name).items()}
    count = math.prod(quantized.shapes[name])
    blocks = -(-count // 64)
    sizes = {name: (count + 1) // 2, f"{name}.absmax": blocks if double_quant else 4 * blocks, f"{name}.quant_map": 64}
    if double_quant:
        sizes |= {f"{name}.nested_absmax": 4 * -(-blocks // 256), f"{name}.nested_quant_map": 1024}
    return sizes | {f"{name}.{STATE_KEY}": _STATE_ROOM}


def _quantized_config(source: Source, quantized: MergedCheckpoint, sizes: Mapping[str, int]) -> dict[str, Any]:
    """config.json for tensors of these names."""
    model, dtype = source.checkpoint.config, _narrowed(source.checkpoint.dtype_of(source.embedding))
    double = any(name.endswith(".nested_absmax") for name in sizes)
    whole = [path for path in source.linears if f"{path}.weight" not in quantized.nf4_names]
    described = nf4_config(model, dtype, double_quant=double, whole=whole)
    return hf_config(model, source.path, dtype) | {"quantization_config": described}


def _quantized_parts(source: Source, quantized: MergedCheckpoint, name: str) -> dict[str, Tensor]:
    if name in quantized.nf4_names:
        weight = quantized.quantize(name).to(torch.device("cpu"))
        parts = dataclasses.replace(weight, dtype=_narrowed(weight.dtype)).state_dict(name)
        scales = parts.get(f"{name}.nested_absmax", parts[f"{name}.absmax"])
        _check_finite(name, scales)
        return parts
    value = source.checkpoint.read(name)
    value = value.to(_narrowed(value.dtype))
    _check_finite(name, value)
    return {name: value}


def _narrowed(dtype: torch.dtype) -> torch.dtype:
    """A source's dtype as a quantized checkpoint has it: NF4's own numbers are fp32, its states have no fp64."""
    return torch.float32 if dtype == torch.float64 else dtype


def _check_finite(name: str, value: Tensor) -> None:
    if not is_finite(value):
        raise InputError(f"the tensor {name} has values that are not finite: take the model from its source again")


def run_merge(config: MergeConfig) -> Path:
    """The `merge` command: W + s B A in the original's dtype, and how far that is from what was trained.

    Returns:
        The folder: Hugging Face's layout, with tokenizer files.
    Raises:
        InputError: what is wrong with the model, the adapter, the text or the target, which is as it was then.
    """
    begun, view, device = time.monotonic(), ConversionView(), pick_device(config.device)
    assert config.lora_weights is not None
    assert config.onto is not None
    source, adapter, run = _open_adapted(config.base_model, config.lora_weights)
    target = _target(config.output_dir, source.path, Path(config.lora_weights))
    double = _double_quant(config.double_quant, run)

    def merged(onto: Onto, adapter: Adapter | None) -> MergedCheckpoint:
        return MergedCheckpoint(
            source.checkpoint, adapter, onto, source.linears, double_quant=double, device=device
        )  # fmt: skip

    chosen = merged(config.onto, adapter)
    text = None
    if config.eval_rows:
        tokenizer = load_tokenizer(source.path)
        text = held_out_examples(config.eval_text, run, tokenizer, config.eval_rows, config.cutoff_len)
    _write_safetensors(chosen, source, target, None, config.max_shard_size, config.overwrite, view)
    _done(view, target, begun)
    # The files do not say how the model was tuned to be asked; and in NF4 made anew it would not be the one written.
    template = "alpaca" if run is None else run.prompt_template_name
    asked = ["--quantize", "none", "--prompt_template_name", template, "--instruction", "…"]
    view.say("Next: " + typed(["jindo-core", "generate", "--base_model", str(target), *asked]))
    if text is not None:
        examples, said = text
        view.say(f"measuring what it costs, on {said} …")
        others = {_called(onto): merged(onto, adapter) for onto in _possible(source.checkpoint)}
        # What is measured of the chosen one is what was written.
        written = MergedCheckpoint(open_checkpoint(target), None, "original", source.linears, device=device)
        others[_called(config.onto)] = written
        total = (1 + len(others)) * source.checkpoint.config.num_hidden_layers
        with view.bar("measuring drift", total, in_bytes=False) as advance:
            rows = measure_drift(
                others, merged("nf4", None), adapter, examples, tokenizer.pad_id, device, lambda: advance(1)
            )  # fmt: skip
        assert rows[0].model == TRAINED
        view.drift([dataclasses.astuple(row) for row in rows], said)
    return target


def _called(onto: Onto) -> str:
    return f"merged onto {'the original' if onto == 'original' else 'NF4'}"


def _possible(base: Checkpoint) -> tuple[Onto, ...]:
    return ("nf4",) if base.quantized else ("original", "nf4")


def run_export(config: ExportConfig) -> Path:
    """The `export` command: the model, an adapter merged where one is given, in another format.

    Returns:
        The folder, or the file.
    Raises:
        InputError: what is wrong with the model or the target, or what the format has no place for.
    """
    begun, view, device = time.monotonic(), ConversionView(), pick_device(config.device)
    if config.lora_weights is None:
        source, adapter, run = open_source(config.base_model), None, None
        onto: Onto = "nf4" if source.checkpoint.quantized else "original"
    else:
        assert config.onto is not None
        (source, adapter, run), onto = _open_adapted(config.base_model, config.lora_weights), config.onto
    place = config.output_file if config.format == "gguf" else config.output_dir
    target = _target(place, source.path, *([] if config.lora_weights is None else [Path(config.lora_weights)]))
    double = _double_quant(config.double_quant, run)
    model = MergedCheckpoint(source.checkpoint, adapter, onto, source.linears, double_quant=double, device=device)
    if config.format == "safetensors":
        _write_safetensors(model, source, target, config.dtype, config.max_shard_size, config.overwrite, view)
    elif config.format == "meta":
        _write_meta(model, source, target, config.dtype, config.overwrite, view)
    else:
        _write_gguf(model, source, target, config.dtype or "f16", config.overwrite, view)
    _done(view, target, begun)
    if run is not None:
        view.say(f"its prompts have the template {run.prompt_template_name}: generate takes --prompt_template_name")
    return target


# --- the three formats ------------------------------------------------------------------------------------


def _write_safetensors(
    model: MergedCheckpoint, source: Source, target: Path, dtype: str | None, shard: str, overwrite: bool,
    view: ConversionView,
) -> None:  # fmt: skip
    sizes = {name: _bytes_as(model, name, dtype) for name in source.names}
    needs = sum(sizes.values()) + _side_bytes(source.path)
    limit = size_in_bytes(shard)
    assert limit is not None
    with staged(target, overwrite=overwrite, needs=needs, marks=_MARKS) as folder:
        with view.bar("writing", sum(sizes.values())) as advance, SafetensorsWriter(folder, sizes, limit) as writer:
            for name in source.names:
                value = _as(model, name, dtype)
                writer.write(name, value)
                advance(value.nbytes)
        kept = _DTYPES[dtype] if dtype else model.dtype_of(source.embedding)
        _write_json(folder / "config.json", hf_config(model.config, source.path, kept))
        _copy_side_files(source.path, folder)
        sync_folder(folder)
        verify_safetensors(writer.written)
        _same_shapes(open_checkpoint(folder), source)


def _write_meta(
    model: MergedCheckpoint, source: Source, target: Path, dtype: str | None, overwrite: bool, view: ConversionView
) -> None:
    params = meta_params(model.config)
    kept = _DTYPES[dtype] if dtype else model.dtype_of(source.embedding)
    if kept not in _DTYPES.values():
        raise InputError(f"the model's weights are {kept}: give --dtype f32, bf16 or f16")
    name_of = {v: k for k, v in _DTYPES.items()}
    # Meta's code has a head of its own, also where it is the embedding.
    read_as = {name: name for name in source.names}
    read_as.setdefault("lm_head.weight", source.embedding)
    shapes = {}
    for name, ours in read_as.items():
        theirs = rename(name, "huggingface", "meta")
        if theirs is None:
            raise InputError(f"the tensor {name} has no name in Meta's LLaMA: give --format safetensors")
        shapes[theirs] = model.shapes[ours]
    total = sum(math.prod(shape) for shape in shapes.values()) * kept.itemsize
    with staged(target, overwrite=overwrite, needs=total + _side_bytes(source.path), marks=_MARKS) as folder:
        with view.bar("writing", total) as advance:

            def tensors() -> Iterator[Tensor]:
                heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
                for name, ours in read_as.items():
                    value = qk_to_pairs(name, _as(model, ours, name_of[kept]), heads, groups)
                    yield value
                    advance(value.nbytes)

            digests = write_pth(folder / WEIGHTS, shapes, kept, tensors())
        _write_json(folder / PARAMS, params)
        _copy_side_files(source.path, folder)
        sync_folder(folder)
        verify_pth(folder / WEIGHTS, digests)
        open_checkpoint(folder)


def _write_gguf(
    model: MergedCheckpoint, source: Source, target: Path, dtype: str, overwrite: bool, view: ConversionView
) -> None:
    fields = model_fields(model.config, target.stem, dtype)
    if window := model.config.window(0):
        view.say(f"note: llama.cpp sees all tokens, this model the last {window}: beyond those, its text will differ")
    vocabulary, notes = tokenizer_fields(source.path, model.config.vocab_size)
    fields |= vocabulary
    for note in notes:
        view.say(f"note: {note}: such texts become other tokens there")
    stored = stored_tensors({name: model.shapes[name] for name in source.names}, dtype)
    odd = [one.source for one in stored if dtype == "q8_0" and one.kind == "f16"]
    if odd:
        view.say(f"note: {len(odd)} tensors such as {odd[0]} have rows that are no multiple of 32: kept in f16")
    needs = sum(one.nbytes for one in stored) + _SPARE + 64 * model.config.vocab_size
    with staged(target, overwrite=overwrite, needs=needs, marks=(".gguf",)) as folder:
        file = folder / target.name
        with view.bar("writing", sum(model.nbytes_of(name) for name in source.names)) as advance:

            def read(name: str) -> Tensor:
                value = model.read(name)
                _check_finite(name, value)
                advance(model.nbytes_of(name))
                return value

            digests = write_gguf(file, fields, model.config, stored, read)
        sync_folder(folder)
        verify_gguf(file, fields, digests)


# --- what they share ----------------------------------------------------------------------------------------


def _open_adapted(base_model: str | None, lora_weights: str) -> tuple[Source, Adapter, RunRecord | None]:
    base, run = base_and_run(base_model, lora_weights)
    source = open_source(base)
    shape = source.checkpoint.shapes[source.embedding]
    ends = {"lm_head": shape, source.embedding.removesuffix(".weight"): shape}
    return source, read_adapter(lora_weights, source.linears, ends), run


def _double_quant(given: bool | None, run: RunRecord | None) -> bool:
    trained = True if run is None else bool(run.settings.get("double_quant", True))
    return trained if given is None else given


def _target(name: str | None, *sources: Path) -> Path:
    """The target's path; refused where it is, or holds, what is read, or lies in a folder that is."""
    assert name is not None
    if "\0" in name:
        raise InputError(f"{name!r} can't be a path, expected one without a null byte: give another name")
    target = Path(name).expanduser().resolve()
    for source in (source.resolve() for source in sources):
        if target in (source, *source.parents) or source in target.parents:
            how = "lies in" if source in target.parents else "is, or holds,"
            raise InputError(f"{target} {how} {source}, which is read: give another name")
    return target


def _bytes_as(model: MergedCheckpoint, name: str, dtype: str | None) -> int:
    return math.prod(model.shapes[name]) * _DTYPES[dtype].itemsize if dtype else model.nbytes_of(name)


def _as(model: MergedCheckpoint, name: str, dtype: str | None) -> Tensor:
    """A weight in a dtype (None: its own), seen to be finite there."""
    value = model.read(name)
    _check_finite(name, value)
    if dtype is None or value.dtype == _DTYPES[dtype]:
        return value
    cast = value.to(_DTYPES[dtype])
    if not is_finite(cast):
        raise InputError(f"the tensor {name} does not fit {dtype}: give --dtype bf16 or f32")
    return cast


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _side_bytes(path: Path) -> int:
    return _SPARE + (sum(file.stat().st_size for file in _side_files(path)) if path.is_dir() else 0)


def _side_files(folder: Path) -> list[Path]:
    return [file for file in (*(folder / name for name in SIDE_FILES), *sorted(folder.glob("*.py"))) if file.is_file()]


def _copy_side_files(path: Path, folder: Path) -> None:
    """Tokenizer and generation settings; out of a GGUF file the tokenizer that it brings."""
    if path.is_dir():
        for file in _side_files(path):
            content, copy = read_bytes(file), folder / file.name
            copy.write_bytes(content)
            if copy.read_bytes() != content:
                raise InputError(f"{copy} read back differs from {file}: the disk is faulty")
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    tokenizer.save_pretrained(str(folder))


def _same_shapes(written: Checkpoint, source: Source) -> None:
    expected = {name: source.checkpoint.shapes[name] for name in source.names}
    if written.shapes != expected:
        odd = sorted(set(written.shapes.items()) ^ set(expected.items()))[0][0]
        raise InputError(f"the tensor {odd} read back differs from what was written: the disk is faulty")


def _done(view: ConversionView, target: Path, begun: float) -> None:
    files = [target] if target.is_file() else [path for path in target.iterdir() if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    said = f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
    count = f"{len(files)} file{'s' if len(files) > 1 else ''}"
    view.say(f"wrote {target}: {count}, {said}, read back and compared, {time.monotonic() - begun:.1f} s")
