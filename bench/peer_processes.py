"""The faults of bench/peer_faults.py that need processes of their own: signals, two trainers, several ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from bench.peer_runs import LIMIT, SAVES, Bench

RANKS = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
OPTIONS = {"transformers": "jit", "lightning": "on_exception"}
"""What a peer offers beyond its defaults for a run that is stopped: enable_jit_checkpoint, OnExceptionCheckpoint."""
NO_SAVES = {"pace": 2.0, "save_steps": 100}
"""Of a run that gets a signal: no checkpoint is due, so that one which is there came of the signal; and steps are long
enough that it doesn't end by itself meanwhile."""
HANG_LIMIT, HANG_PATIENCE = 10, 120
"""Seconds: the collectives' limit of the run of which a rank hangs, and how long that is then watched."""


def _reached(job: dict[str, Any], process: subprocess.Popen[bytes], step: int) -> None:
    """Wait until the run is in this step."""
    deadline = time.monotonic() + LIMIT
    progress = Path(job["progress"])
    while process.poll() is None and time.monotonic() < deadline:
        if progress.exists() and f'"step": {step},' in progress.read_text():
            return
        time.sleep(0.05)


def _signalled(bench: Bench, kind: signal.Signals, extra: str, times: int = 1) -> tuple[int | None, bool, str, float]:
    """A signal in the step after that of a usual run's first save: exit code, whether a checkpoint came of it, what the
    same command then does, and the seconds that it took to end."""
    peer = bench.peer
    step = SAVES[peer.name][0] + 1
    job = peer.job(extra=extra, **NO_SAVES)
    process = peer.start(job)
    _reached(job, process, step)
    before = _files(job)  # torchtune's of the first epoch
    sent = time.monotonic()
    for number in range(times):
        if number:
            time.sleep(0.2)
        process.send_signal(kind)
    ended = peer.wait(job, process)
    took = time.monotonic() - sent
    saved = bool(_files(job) - before)
    code = None if ended.code is None else 128 - ended.code if ended.code < 0 else ended.code
    again = bench.resume(job, pace=0.0)
    return code, saved, bench.became(again) + (f", at step {again.report['start']}" if again.report else ""), took


def _files(job: dict[str, Any]) -> set[str]:
    """Names of checkpoints, and of the files that are one."""
    found = Path(job["out"]).rglob("*")
    return {path.name for path in found if "checkpoint" in path.name or path.suffix in (".ckpt", ".pt")}


def signals(bench: Bench) -> dict[str, str]:
    """SIGTERM and SIGINT, as the peer comes and with what it offers; then a second one at once."""
    option = OPTIONS.get(bench.peer.name)
    said, detail = [], {}
    for kind in (signal.SIGTERM, signal.SIGINT):
        for extra in ["", option] if option else [""]:
            code, saved, _, _ = detail[f"{kind.name} {extra}"] = _signalled(bench, kind, extra or "")
            named = f" with {extra}" if extra else ""
            said.append(f"{kind.name}{named}: {code}, {'a checkpoint' if saved else 'no checkpoint'}")
    found = {"test_a_signal_ends_a_process_with_its_code_and_a_checkpoint": "; ".join(said)}
    code, saved, _, took = detail["twice"] = _signalled(bench, signal.SIGTERM, option or "", 2)
    named = f"with {option}: " if option else ""
    what = f"{named}{code} after {took:.0f} s, {'a' if saved else 'no'} checkpoint"
    found["test_a_second_signal_acts_at_once"] = what
    bench.detail["signals"] = detail
    return found


def races(bench: Bench) -> dict[str, str]:
    """Two trainers in one folder: the second while the first trains, and both at once."""
    peer, found = bench.peer, {}
    for test, waits in (
        ("test_the_second_trainer_in_a_folder_is_refused_before_it_reads_anything", True),
        ("test_of_two_that_start_together_one_is_refused", False),
    ):
        first = peer.job(pace=1.0)
        second = first | {name: f"{first[name]}2" for name in ("report", "progress")} | {"learning_rate": 1e-3}
        one = peer.start(first)
        if waits:
            _reached(first, one, 2)
        other = peer.start(second)
        ends = [peer.wait(first, one), peer.wait(second, other)]
        codes = [ended.code for ended in ends]
        bench.detail[test] = [codes, [ended.error for ended in ends]]
        both = "no lock: both train to the end, with code 0"
        found[test] = both if codes == [0, 0] else f"exit codes {codes[0]} and {codes[1]}"
    found["test_a_killed_trainer_s_lock_is_gone"] = "not tried: it has no lock"
    return found


def ranks(bench: Bench) -> dict[str, str]:
    """Two ranks under torchrun with gloo: one is killed, one hangs, torchrun gets SIGTERM."""
    peer = bench.peer
    tests = {
        "killed": "test_when_a_rank_is_killed_the_others_stop_and_the_run_goes_on",
        "hangs": "test_a_rank_that_hangs_ends_the_run_in_time",
        "signal": "test_a_signal_to_torchrun_saves_a_checkpoint",
    }
    if peer.name == "torchtune":
        return dict.fromkeys(tests.values(), "not tried: its recipe for several devices is another")
    step = SAVES[peer.name][0] + 1
    found, detail = {}, {}
    for what, test in tests.items():
        changes: dict[str, dict[str, Any]] = {
            "killed": {"pace": 1.0}, "hangs": {"hang_at": step, "timeout_s": HANG_LIMIT},
            "signal": {"extra": OPTIONS[peer.name], **NO_SAVES},
        }  # fmt: skip
        job = peer.job(ranks=2, **changes[what])
        process = peer.start(job, RANKS)
        _reached(job, process, step)
        sent, before = time.monotonic(), _files(job)
        if what == "killed":
            os.kill(_pid(job, 1), signal.SIGKILL)
        elif what == "signal":
            process.send_signal(signal.SIGTERM)
        ended = peer.wait(job, process, HANG_PATIENCE)
        took = time.monotonic() - sent
        detail[what] = [ended.code, took, sorted(_files(job) - before), ended.error]
        end = f"still there after {took:.0f} s" if ended.code is None else f"code {ended.code} after {took:.0f} s"
        if what == "hangs":
            end += f" (its limit set to {HANG_LIMIT} s)"
        if what == "signal":
            end = f"with {OPTIONS[peer.name]}: {end}, {'a' if _files(job) - before else 'no'} checkpoint"
        found[test] = end
    bench.detail["ranks"] = detail
    return found


def _pid(job: dict[str, Any], rank: int) -> int:
    rows = [json.loads(line) for line in Path(job["progress"]).read_text().splitlines()]
    return next(row["pid"] for row in rows if row["rank"] == rank)
