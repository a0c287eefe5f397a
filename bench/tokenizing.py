"""Tokenizing a file as alpaca-lora does, by us and by `datasets.map`: from JSON lines to rows on disk.

`python -m bench.tokenizing KIND MODEL FILE FOLDER PROCESSES WHOLE` is one round of the peer in a process of its own, so
that its forks hold nothing of ours; it prints the seconds, without those of its imports.
The peer's function is alpaca-lora's generate_and_tokenize_prompt (finetune.py): the whole text, then the prompt again.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

CUTOFF = 256
TEMPLATE = "alpaca"
KINDS = ("smollm2", "llama")
"""A byte-level BPE through the tokenizers library, and a SentencePiece model through its own."""


def write_rows(sources: list[Path], path: Path, count: int) -> None:
    """`count` rows of files in any format we read, over and over, in alpaca's columns."""
    from jindo_core.data.records import read_records

    records = [record for source in sources for record in read_records(source)]
    with path.open("w", encoding="utf-8") as file:
        for record in islice(cycle(records), count):
            instruction = f"{record.system}\n{record.instruction}" if record.system else record.instruction
            row = {"instruction": instruction, "input": record.input, "output": record.output}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


# --- ours -----------------------------------------------------------------------------------------------


def ours(model: Path, path: Path, train_on_inputs: bool) -> tuple[float, Any]:
    """Seconds of one round into a cache that holds nothing yet, and the rows."""
    from jindo_core.data.examples import Encoder
    from jindo_core.data.formats import detect_format
    from jindo_core.data.readers import open_rows
    from jindo_core.data.store import tokenize
    from jindo_core.data.templates import load_template
    from jindo_core.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    template = load_template(TEMPLATE, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        encoder = Encoder(tokenizer, template, cutoff_len=CUTOFF, train_on_inputs=train_on_inputs)
        source = open_rows(path)
        rows = tokenize(source, detect_format(source), encoder, cache=Path(folder))
        return time.perf_counter() - began, rows


# --- the peer -------------------------------------------------------------------------------------------


def _their_calls(kind: str, model: Path) -> tuple[Callable[[str], list[int]], int]:
    """Text -> ids, cut; and EOS."""
    if kind == "llama":
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
        return lambda text: [processor.bos_id(), *processor.encode(text)][:CUTOFF], processor.eos_id()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model.parent), gguf_file=model.name)
    call = lambda text: tokenizer(text, truncation=True, max_length=CUTOFF, padding=False).input_ids  # noqa: E731
    return call, tokenizer.eos_token_id


def theirs(
    kind: str, model: Path, path: Path, folder: Path, processes: int, train_on_inputs: bool
) -> tuple[float, Any]:
    """Seconds of load_dataset and map, and the data set."""
    import datasets

    from jindo_core.data.templates import load_template

    datasets.disable_progress_bars()
    template = load_template(TEMPLATE)
    tokenize, eos = _their_calls(kind, model)

    def row(point: dict[str, str]) -> dict[str, list[int]]:
        prompt = template.prompt(point["instruction"], point["input"])
        ids = tokenize(prompt + point["output"])
        if ids[-1] != eos and len(ids) < CUTOFF:
            ids = [*ids, eos]
        if train_on_inputs:
            return {"input_ids": ids, "labels": list(ids)}
        masked = len(tokenize(prompt))
        return {"input_ids": ids, "labels": [-100] * masked + ids[masked:]}

    began = time.perf_counter()
    data = datasets.load_dataset("json", data_files=str(path), cache_dir=str(folder), split="train")
    data = data.map(row, num_proc=processes if processes > 1 else None, remove_columns=data.column_names)
    return time.perf_counter() - began, data


def _peer_round(kind: str, model: Path, path: Path, processes: int, train_on_inputs: bool) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench.tokenizing", kind, str(model), str(path), folder, str(processes)]
        done = subprocess.run([*command, str(int(train_on_inputs))], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


# --- both -----------------------------------------------------------------------------------------------


def differences(kind: str, model: Path, path: Path, train_on_inputs: bool) -> Iterator[str]:
    """Rows whose ids or labels are not the peer's."""
    _, rows = ours(model, path, train_on_inputs)
    with tempfile.TemporaryDirectory() as folder:
        _, data = theirs(kind, model, path, Path(folder), 1, train_on_inputs)
        for number, (own, row) in enumerate(zip(rows, data, strict=True), 1):
            nothing = all(label == -100 for label in row["labels"][1:])
            if (own.input_ids, own.labels) != (([], []) if nothing else (row["input_ids"], row["labels"])):
                yield f"row {number}: {own} and {row}"


def compare(kind: str, model: Path, path: Path, *, rounds: int, train_on_inputs: bool) -> dict[str, Any]:
    """Rows a second, medians of rounds in which all take their turn."""
    count = sum(1 for _ in path.open("rb"))
    taken: dict[str, list[float]] = {"jindo": [], "datasets.map, 1 process": [], "datasets.map, 2 processes": []}
    for _ in range(rounds):
        for processes, name in enumerate(taken):
            if processes:
                taken[name].append(_peer_round(kind, model, path, processes, train_on_inputs))
            else:
                taken[name].append(ours(model, path, train_on_inputs)[0])
    rates = {name: count / statistics.median(times) for name, times in taken.items()}
    best = max((name for name in rates if name != "jindo"), key=rates.__getitem__)
    ratios = [theirs / own for own, theirs in zip(taken["jindo"], taken[best], strict=True)]
    return {
        "tokenizer": kind, "train_on_inputs": train_on_inputs, "rows": count, "rates": rates, "best": best,
        "ratio": statistics.median(ratios), "ratios": ratios,
    }  # fmt: skip


if __name__ == "__main__":
    _kind, _model, _path, _folder, _processes, _whole = sys.argv[1:]
    print(theirs(_kind, Path(_model), Path(_path), Path(_folder), int(_processes), _whole == "1")[0])
