"""Several runs in the processes of one torchrun: `launch` starts this file, and every rank does each job in turn."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

from jindo_core import feeder, host_memory, loader, mmlu, outcome, pages, parallel, prepare
from jindo_core import step as stepping
from jindo_core import train as training
from jindo_core.config import resolve_train_config
from jindo_core.errors import TrainingError
from jindo_core.plan import as_json

LETTERS = ("B", "L", "S", "T")
"""In place of MMLU's: stories260K has no tokens for those."""


def launch(folder, size, jobs, *, limit=120, check=True):
    """Do jobs in `size` ranks; returns {job's name: what each rank has to say of it}, and the finished process.

    jobs: {name: {"settings": …, and perhaps a fault and where: "signal", "memory", "rows_memory" (of its rows'
    reading), "update_memory", "nan", "hang", "host" (which is out of memory): [rank, step]; "timeout": seconds that
    ranks wait for each other; "absmax" or "packed": that part of the weights differs on rank 1; "live": count the
    storages that are alive from its first step on; "process": bytes that each rank is told to hold beside the step;
    "slow_end": a file that the first rank makes when it has drawn for a while; or "": it fails there}}. Or
    {name: {"steps": …}}: the simulation's steps, with real tensors.
    """
    folder.mkdir()
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(size), __file__, str(folder)]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=limit, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0 or not check, done.stderr
    found = {}
    for name in jobs:
        said = [folder / f"{name}.{rank}.json" for rank in range(size)]
        found[name] = [json.loads(path.read_text()) if path.exists() else None for path in said]
    return found, done


def given(model, rows, out, **changes):
    """A run's settings: 8 steps of 8 rows, five and a half to an epoch."""
    return {
        "base_model": str(model), "data_path": str(rows), "output_dir": str(out), "batch_size": 8,
        "micro_batch_size": 4, "max_steps": 8, "learning_rate": 1e-2, "cutoff_len": 96, "val_set_size": 5,
        "lora_dropout": 0.0, "prompt_template_name": "alpaca_short", "device": "cpu", "dtype": "fp32",
        "save_steps": 0, "lora_r": 2, "eval_steps": 4, "train_on_inputs": False,
    } | changes  # fmt: skip


def write_rows(path):
    """43 rows of differing length."""
    animals = ("cat", "dog", "bird", "fish", "little red fox")
    data = [
        {"instruction": f"Name animal {i}.", "input": "", "output": f"It is a {animals[i % 5]}" + ", I think" * (i % 4)}
        for i in range(43)
    ]
    path.write_text(json.dumps(data))
    return path


def write_questions(path):
    """9 for MMLU, of two subjects."""
    asked = [
        {"subject": f"s{i % 2}", "input": "Who?" + " It is a cat." * i, "output": LETTERS[i % 4]} for i in range(9)
    ]
    path.write_text(json.dumps(asked))
    return path


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    """Of every step and every measurement, in order."""
    return [row[name] for row in metrics(out) for name in ("loss", "eval_loss") if name in row]


# --- inside a rank --------------------------------------------------------------------------------------


def make_faults(job, rank):
    """Break this rank where the job says so; once."""
    step_of, accumulate, seen = [0], ORIGINAL["accumulate"], set()
    host_memory.shortest = ORIGINAL["shortest"]
    messages = []

    def due(kind):
        if job.get(kind) == [rank, step_of[0]] and kind not in seen:
            seen.add(kind)
            return True
        return False

    def reduced(value, *given):
        messages[-1].append(value.nbytes)
        return ORIGINAL["all_reduce"](value, *given)

    def rows_of(own):
        if due("rows_memory"):
            raise MemoryError
        return ORIGINAL["collated"](own)

    def step(own, batches, number, *rest):
        step_of[0] = number
        messages.append([])
        parallel.distributed.all_reduce = reduced
        if due("signal"):
            signal.raise_signal(signal.SIGTERM)
        if due("host"):
            host_memory.shortest = lambda *_: pages.Limit(1 << 30, 0)
        if due("update_memory"):
            original, tries = own.optimizer.step, []

            def short(*given, **more):
                tries.append(1)
                if len(tries) == 1:
                    raise torch.OutOfMemoryError("out of memory")
                return original(*given, **more)

            own.optimizer.step = short
        return ORIGINAL["take_step"](own, batches, number, *rest)

    def accumulated(own, batches):
        loss = accumulate(own, batches)
        if due("memory"):
            raise torch.OutOfMemoryError("out of memory")
        if due("nan"):
            next(p for p in own.model.parameters() if p.grad is not None).grad.fill_(float("nan"))
        if due("hang"):
            time.sleep(3600)
        return loss

    training.take_step, stepping.accumulate = step, accumulated
    feeder.StepRows.collated, parallel.distributed.all_reduce = rows_of, ORIGINAL["all_reduce"]
    return messages


def make_slow(path, rank, said):
    """The first rank takes its time at the end; and what the others find when they come to a meeting there."""
    def draw(*_):
        if not path:
            raise TrainingError("it can't be drawn")
        time.sleep(0.5)
        Path(path).touch()

    def meeting(*given):
        said["after_the_first"] = Path(path).exists()
        return ORIGINAL["barrier"](*given)

    training.draw_loss, parallel.distributed.barrier = draw, meeting


def quantized(spoiled, *given, **more):
    """A weight with parts that are others than they should be."""
    weight = ORIGINAL["quantize"](*given, **more)
    return dataclasses.replace(weight, **{name: getattr(weight, name) ^ 1 for name in spoiled})


ORIGINAL = {
    "quantize": loader.quantize_nf4, "take_step": training.take_step, "accumulate": stepping.accumulate,
    "prepare": training.prepare, "plan": prepare._plan,
    "shortest": host_memory.shortest, "collated": feeder.StepRows.collated,
    "all_reduce": parallel.distributed.all_reduce, "barrier": parallel.distributed.barrier,
}  # fmt: skip


def matrices(module):
    """The frozen ones."""
    return [p for p in module.parameters() if not p.requires_grad and p.ndim > 1]


def is_whole(layer):
    """Whether this rank has more than its part of a layer."""
    return not any(hasattr(p, "to_local") for p in matrices(layer))


def simulation():
    """bench's, whose counter sees the storages of this process."""
    sys.path.append(str(Path(__file__).parents[2]))
    return importlib.import_module("bench.simulation")


def steps_alone(job, rank):
    """Random weights, no data: only what is alive."""
    counting = simulation()
    shape = counting.SHAPES[job["shape"]]
    counter = counting.live(shape, counting.Step(**job["steps"]))
    return {"rank": rank, "peak": counter.peak, "at_peak": counter.at_peak}


def do(job, rank):
    """One run; what became of it."""
    kept, whole, steps = [], [], []
    counter = None
    if "live" in job:
        counting = simulation()
        counter = counting.LiveBytes(counting.cpu_workspace)
    if "process" in job:
        prepare.current_bytes = lambda _: job["process"][rank]

    def planned(*given, **more):
        config, step = ORIGINAL["plan"](*given, **more)
        steps.append(step)
        return config, step

    def prepared(*given):
        kept.append(ORIGINAL["prepare"](*given))
        if counter is not None:
            counter.peak = 0  # loading has its own
        layers = list(kept[-1].model.stack.layers)
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_: whole.append(sum(map(is_whole, layers))))
        return kept[-1]

    training.prepare, prepare._plan = prepared, planned
    messages = make_faults(job, rank)
    loader.quantize_nf4 = functools.partial(quantized, {"absmax", "packed"} & job.keys() if rank == 1 else ())
    if "timeout" in job:
        parallel.TIMEOUT = timedelta(seconds=job["timeout"])
    said = {"rank": rank}
    training.draw_loss, parallel.distributed.barrier = lambda *_: None, ORIGINAL["barrier"]
    if "slow_end" in job:
        make_slow(job["slow_end"], rank, said)
    try:
        with contextlib.ExitStack() as watched:
            if counter is not None:
                watched.enter_context(counter)
                watched.enter_context(counter.watching())
            training.train(*resolve_train_config(job["settings"]))
        said["ended"] = "well"
    except (ValueError, RuntimeError, training.Stopped, SystemExit) as error:
        said |= {"ended": type(error).__name__, "text": str(error), "code": getattr(error, "code", None)}
    said["prepared"], said["messages"] = bool(kept), messages
    if counter is not None:
        said["peak"], said["at_peak"] = counter.peak, counter.at_peak
    if steps:
        said["planned"] = as_json(steps[0], None)
    if whole:
        frozen = matrices(kept[0].model.stack.layers)
        own = [p.to_local() if hasattr(p, "to_local") else p for p in frozen]
        said["whole_at_once"] = max(whole)
        said["matrix_bytes"] = sum(p.nbytes for p in own)
        said["gave_way"] = kept[0].relief.state()
        said["adapter"] = [p.sum().item() for p in kept[0].model.parameters() if p.requires_grad]
        said["random"] = torch.get_rng_state().sum().item()
    return said


if __name__ == "__main__":
    folder, own_rank = Path(sys.argv[1]), int(os.environ["RANK"])
    mmlu.LETTERS = LETTERS
    host_memory.INTERVAL, pages._KEPT_IN_RAM = 0.0, set()
    outcome.ANSWER_TOKENS, parallel.GRACE = 2, 0.0
    for job_name, given_job in json.loads((folder / "jobs.json").read_text()).items():
        found_here = (steps_alone if "steps" in given_job else do)(given_job, own_rank)
        (folder / f"{job_name}.{own_rank}.json").write_text(json.dumps(found_here))
        if "hang" in given_job:
            sys.exit(1)  # as the command does, and torchrun ends the other
