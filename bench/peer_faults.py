"""What other trainers do under the faults of docs/reliability.md, by doing them: on the CPU, with a tiny LLaMA.

python -m bench.peer_faults --base_model FOLDER [--peers transformers,lightning,torchtune] [--python PYTHON]
python -m bench.peer_faults --docs RESULT.json      the peers' columns of docs/reliability.md from a result

FOLDER is a small LLaMA in Hugging Face's layout (stories260K). A peer that PYTHON can't import is named and left out.
Runs are forked from one process a peer (peer_trainers.py), whose disk is broken from below (peer_disk.c); what needs
signals or several processes starts real ones. Needs a C compiler. Results go to bench/results/.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BENCH = Path(__file__).resolve().parent
DOCS = BENCH.parent / "docs" / "reliability.md"
PEERS = {"transformers": "transformers' Trainer", "lightning": "Lightning", "torchtune": "torchtune"}
SAVES = {"transformers": (3, 6), "lightning": (3, 6), "torchtune": (5, 10)}
"""After which steps a run has a checkpoint that it can go on from; it is killed one or two steps after the second."""
DIES = {"transformers": 7, "lightning": 7, "torchtune": 12}
LIMIT = 90.0
"""Seconds for one run: one that is not killed takes less than one, and ten with its imports."""
COUNT, KILL, FULL = 0, 1, 2  # peer_disk.c's modes

NOT_TRIED = {
    "test_a_measurement_is_left_off_and_made_after_all": "not tried",
    "test_a_signal_on_a_full_disk_says_what_stands": "not tried",
    "test_what_gave_way_gives_way_again": "not tried: needs a GPU",
    "test_a_budget_is_planned_once": "no such setting",
}


@dataclasses.dataclass
class Ended:
    """code: exit code, minus a signal, or None after LIMIT; words: its last ones; report: {} if it was never written."""

    code: int | None
    words: str
    report: dict[str, Any]
    progress: list[dict[str, Any]]

    @property
    def error(self) -> str:
        """The kind of error that it ended with."""
        kinds = re.findall(r"^([\w.]*(?:Error|Exception|Interrupt))\b", self.words, re.MULTILINE)
        return kinds[-1].rpartition(".")[2] if kinds else f"code {self.code}"


class Peer:
    """Runs of one peer, each in a folder of its own below `work`."""

    def __init__(self, name: str, python: str, base: Path, work: Path, library: Path) -> None:
        self.name, self.python, self.base, self.work, self.cases = name, python, base, work / name, 0
        self.environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
            "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        self.work.mkdir(parents=True)
        self.rows = self.write_rows("rows.json", 0)
        with (self.work / "server.log").open("w") as words:
            self.server = subprocess.Popen(
                [python, str(BENCH / "peer_trainers.py"), name, "--serve"], stdin=subprocess.PIPE, stderr=words,
                stdout=subprocess.PIPE, text=True, env=self.environment | {"LD_PRELOAD": str(library)},
            )  # fmt: skip
        said = self.server.stdout.readline()  # type: ignore[union-attr]
        if not said:
            last = (self.work / "server.log").read_text().strip().splitlines()[-1:]
            raise ModuleNotFoundError(f"{name} does not start: {''.join(last)}")
        self.versions = json.loads(said)["versions"]

    def write_rows(self, name: str, seed: int) -> Path:
        """20 rows of 24 token ids."""
        chance = np.random.RandomState(seed)
        (self.work / name).write_text(json.dumps(chance.randint(3, 500, (20, 24)).tolist()))
        return self.work / name

    def job(self, state: Path | None = None, **changes: Any) -> dict[str, Any]:
        """A job in a new folder; state: another one's `disk`, of which it gets a copy."""
        self.cases += 1
        home = self.work / f"{self.cases:04}"
        home.mkdir()
        if state is not None:
            subprocess.run(["cp", "-a", str(state), str(home / "disk")], check=True)
        given = {
            "base": str(self.base), "rows": str(self.rows), "out": str(home / "disk" / "out"),
            "scratch": str(home / "disk" / "tmp"), "report": str(home / "report"), "progress": str(home / "progress"),
        }  # fmt: skip
        return given | changes

    def run(self, job: dict[str, Any]) -> Ended:
        """In a child of the one that has all imported."""
        log = Path(job["report"]).with_name("log")
        self.server.stdin.write(json.dumps({"job": job, "log": str(log), "limit": LIMIT}) + "\n")  # type: ignore
        self.server.stdin.flush()  # type: ignore[union-attr]
        return _ended(job, json.loads(self.server.stdout.readline())["code"], log)  # type: ignore[union-attr]

    def start(self, job: dict[str, Any], launcher: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        """A process of its own."""
        with Path(job["report"]).with_name("log").open("wb") as words:
            return subprocess.Popen(
                [self.python, *launcher, str(BENCH / "peer_trainers.py"), self.name, "--job", json.dumps(job)],
                stdout=words, stderr=subprocess.STDOUT, env=self.environment,
            )  # fmt: skip

    def wait(self, job: dict[str, Any], process: subprocess.Popen[bytes]) -> Ended:
        code: int | None = None
        try:
            code = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return _ended(job, code, Path(job["report"]).with_name("log"))

    def close(self) -> None:
        self.server.stdin.close()  # type: ignore[union-attr]
        self.server.wait()

    def files(self, state: Path) -> list[str]:
        """The files of the newest checkpoint below a `disk`, those that only readers of text look at left out."""
        out = state / "out"
        if self.name == "lightning":
            return ["out/last.ckpt"]
        if self.name == "transformers":
            found = sorted((out / f"checkpoint-{SAVES[self.name][1]}").iterdir())
        else:
            found = [*sorted((out / "epoch_1").iterdir()), out / "recipe_state" / "recipe_state.pt"]
        return [str(path.relative_to(state)) for path in found if path.suffix != ".md"]


def _ended(job: dict[str, Any], code: int | None, log: Path) -> Ended:
    report, progress = Path(job["report"]), Path(job["progress"])
    rows = [json.loads(line) for line in progress.read_text().splitlines()] if progress.exists() else []
    return Ended(code, log.read_text(errors="replace")[-6000:], json.loads(report.read_text()) if report.exists() else {}, rows)


def disk(job: dict[str, Any]) -> Path:
    return Path(job["out"]).parent


def sampled(first: int, last: int, most: int) -> list[int]:
    """At most `most` of first … last - 1, evenly."""
    return sorted({int(place) for place in np.linspace(first, last - 1, min(most, last - first))})


class Bench:
    """One peer, its run that nothing befalls (`whole`), and the disk of one that was killed (`state`)."""

    def __init__(self, peer: Peer, few: bool) -> None:
        self.peer, self.few = peer, few
        self.whole = peer.run(peer.job())
        if self.whole.code != 0:
            raise RuntimeError(f"{peer.name} can't run here: {self.whole.words[-500:]}")
        killed = peer.job(die_at=DIES[peer.name])
        peer.run(killed)
        self.state = disk(killed)
        self.detail: dict[str, Any] = {}

    def resume(self, job: dict[str, Any], **changes: Any) -> Ended:
        """The same command again, with what the peer has for going on."""
        Path(job["report"]).unlink(missing_ok=True)
        Path(job["progress"]).unlink(missing_ok=True)
        clean = {name: value for name, value in job.items() if name not in ("disk", "die_at", "nan_at")}
        return self.peer.run(clean | {"resume": True} | changes)

    def became(self, ended: Ended) -> str:
        """What a resumed run did, in a word or two."""
        older, newest = SAVES[self.peer.name]
        if ended.code != 0:
            return "hangs" if ended.code is None else f"error: {ended.error}"
        if ended.report["digest"] == self.whole.report["digest"]:
            return "same bytes"
        begun = {0: "afresh", older: "from the one before", newest: "other bytes"}
        return begun.get(ended.report["start"], "other bytes")

    def boundaries(self, step: int) -> tuple[int, int]:
        """Those between the gradients of a step and of the next: its save."""
        at = {row["step"]: row["boundaries"] for row in self.whole.progress}
        return at[step], at[step + 1]


def tally(words: list[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in collections.Counter(words).most_common())


def killed(bench: Bench) -> dict[str, str]:
    """kill -9 at boundaries of the second save, and of a whole run; what the same command does then."""
    peer, found = bench.peer, {}
    first, last = bench.boundaries(SAVES[peer.name][1])
    total = bench.whole.progress[-1]["boundaries"]
    for test, places in (
        ("test_a_save_that_is_killed_anywhere_leaves_a_whole_checkpoint", sampled(first, last, 8 if bench.few else 40)),
        ("test_runs_that_are_killed_end_as_the_one_that_was_not", sampled(0, total, 6 if bench.few else 30)),
    ):
        words = []
        for place in places:
            job = peer.job(disk=(KILL, place))
            ended = peer.run(job)
            words.append(bench.became(bench.resume(job)) if ended.code == -9 else f"was not killed ({ended.code})")
        bench.detail[test] = dict(zip(places, words, strict=True))
        found[test] = f"{len(places)} kills: {tally(words)}"
    synced = {row["step"]: row["syncs"] for row in bench.whole.progress}
    step = SAVES[peer.name][1]
    count = synced[step + 1] - synced[step]
    found["test_files_and_folders_are_synced_before_the_name_is_given"] = f"{count or 'no'} syncs in a save"
    return found


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0" * 64)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "cut": _cut, "longer": _lengthen, "empty": lambda path: os.truncate(path, 0), "missing": Path.unlink,
}  # fmt: skip


def damaged(bench: Bench) -> dict[str, str]:
    """Files of the newest checkpoint cut, lengthened, emptied, removed; then all checkpoints cut; then no moments."""
    peer, words, found = bench.peer, {}, {}
    for name in peer.files(bench.state):
        for damage, do in DAMAGE.items():
            job = peer.job(bench.state)
            do(disk(job) / name)
            words[f"{name} {damage}"] = bench.became(bench.resume(job))
    bench.detail["damage"] = words
    found["test_the_newest_that_is_whole_is_taken_and_others_are_named"] = f"{len(words)} damages: {_kinds(words)}"
    job = peer.job(bench.state)
    for path in disk(job).rglob("*"):
        if path.suffix in (".pt", ".pth", ".ckpt", ".safetensors"):
            _cut(path)
    found["test_when_all_are_damaged_nothing_starts_afresh"] = bench.became(bench.resume(job))
    return found | {"test_a_missing_optimizer_state_is_never_fresh": _without_moments(bench)}


def _kinds(words: dict[str, str]) -> str:
    """Errors together, whatever their kind."""
    return tally(["an error" if word.startswith("error") else word for word in words.values()])


def _without_moments(bench: Bench) -> str:
    import torch

    job = bench.peer.job(bench.state)
    if bench.peer.name == "transformers":
        (disk(job) / "out" / f"checkpoint-{SAVES['transformers'][1]}" / "optimizer.pt").unlink()
    else:
        lightning = bench.peer.name == "lightning"
        path = disk(job) / ("out/last.ckpt" if lightning else "out/recipe_state/recipe_state.pt")
        held = torch.load(path, weights_only=False)
        del held["optimizer_states" if lightning else "optimizer"]
        torch.save(held, path)
    ended = bench.resume(job)
    bench.detail["without moments"] = [ended.code, ended.report, ended.words[-500:]]
    if ended.code != 0:
        return f"{ended.error}"
    fresh = ended.report["updates"] < bench.whole.report["updates"]
    return "resumes in silence, with fresh moments" if fresh else "resumes with moments of unknown origin"


def flipped(bench: Bench) -> dict[str, str]:
    """One bit of the newest checkpoint turned over, at places drawn evenly from each of its files."""
    peer, chance, words = bench.peer, np.random.RandomState(0), {}
    names = peer.files(bench.state)
    each = 3 if bench.few else max(20, 200 // len(names))
    for name in names:
        for place in chance.choice((bench.state / name).stat().st_size * 8, each, replace=False).tolist():
            job = peer.job(bench.state)
            path = disk(job) / name
            data = bytearray(path.read_bytes())
            data[place // 8] ^= 1 << place % 8
            path.write_bytes(data)
            words[f"{name} bit {place}"] = bench.became(bench.resume(job))
            subprocess.run(["rm", "-r", str(disk(job))], check=True)
    bench.detail["flips"] = words
    return {"test_a_flipped_bit_anywhere_is_found": f"{len(words)} flips: {_kinds(words)}"}


def full(bench: Bench) -> dict[str, str]:
    """No room from a boundary of the second save on; then room again, and the same command."""
    peer, words, codes = bench.peer, [], []
    for place in sampled(*bench.boundaries(SAVES[peer.name][1]), 6 if bench.few else 20):
        job = peer.job(disk=(FULL, place))
        ended = peer.run(job)
        codes.append("run goes on" if ended.code == 0 else "run dies")
        words.append(bench.became(bench.resume(job)))
    bench.detail["full"] = [codes, words]
    text = f"{tally(codes)}; resumed with room: {_kinds(dict(enumerate(words)))}"  # type: ignore[arg-type]
    return {"test_a_checkpoint_that_can_t_be_written_costs_no_step_and_no_older_one": text}


def numbers(bench: Bench) -> dict[str, str]:
    """A gradient that is not a number; other settings, weights and rows than the checkpoint's; exactness; again."""
    peer, found = bench.peer, {}
    ended = peer.run(peer.job(nan_at=4))
    weights = "weights finite" if ended.report.get("finite") else "the weights are NaN from then on"
    found["test_the_batch_is_named_by_rows_and_file"] = (
        f"{weights}, run ends with code {ended.code}" if ended.report else f"ends: {ended.error}"
    )
    found["test_skipped_steps_are_counted_through_a_stop"] = "no step is skipped"
    said = {}
    for name, value in {"batch_size": 2, "seed": 2, "learning_rate": 1e-3, "lora_r": 4}.items():
        ended = bench.resume(peer.job(bench.state), **{name: value})
        said[name] = ended.error if ended.code != 0 else _warned(ended, name) or "taken in silence"
    bench.detail["settings"] = said
    found["test_each_fixed_setting_is_refused_by_name"] = "; ".join(f"{k}: {v}" for k, v in said.items())
    base = peer.work / "base"
    subprocess.run(["cp", "-a", str(bench.peer.base), str(base)], check=True)
    job = peer.job(base=str(base), die_at=DIES[peer.name])
    peer.run(job)
    other_weights(base)
    silent = {0: "taken in silence"}
    ended = bench.resume(job)
    found["test_other_weights_are_refused"] = silent.get(ended.code or 0, ended.error) if ended.code is not None else "hangs"
    ended = bench.resume(peer.job(bench.state, rows=str(peer.write_rows("other.json", 1))))
    found["test_other_rows_are_refused_though_they_are_as_long"] = "taken in silence" if ended.code == 0 else ended.error
    found["test_stopped_and_resumed_is_as_never_stopped"] = _exact(bench)
    return found | _again(bench)


def _warned(ended: Ended, setting: str) -> str:
    """What a run that went on said of a setting."""
    stem = {"batch_size": "batch_size", "learning_rate": "learning.rate|\\blr\\b"}.get(setting, setting)
    lines = [line for line in ended.words.splitlines() if re.search(rf"does not match|mismatch|do not match", line)]
    named = [line for line in ended.words.splitlines() if re.search(stem, line) and "args" in line]
    return "taken, said in a warning" if lines and (named or re.search(stem, " ".join(lines))) else ""


def other_weights(base: Path) -> None:
    """The same names and shapes, every matrix a little otherwise."""
    from safetensors.torch import load_file, save_file

    path = base / "model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def _exact(bench: Bench) -> str:
    """Killed between two saves and taken up: the same bytes as never stopped?"""
    options = ["", "plain_loader"] if bench.peer.name == "lightning" else [""]
    words = []
    for extra in options:
        whole = bench.peer.run(bench.peer.job(extra=extra))
        again = bench.peer.run(bench.peer.job(extra=extra))
        job = bench.peer.job(extra=extra, die_at=DIES[bench.peer.name])
        bench.peer.run(job)
        ended = bench.resume(job)
        repeats = whole.report["digest"] == again.report["digest"]
        same = ended.report.get("digest") == whole.report["digest"]
        word = "the same bytes" if same else f"other bytes ({'' if repeats else 'two whole runs differ, too; '}dropout on)"
        words.append(f"{word}{' with torch' + chr(39) + 's DataLoader' if extra else ''}" if ended.code == 0 else ended.error)
        bench.detail[f"exact {extra}"] = [whole.report, again.report, ended.report]
    return "; ".join(words)


def _again(bench: Bench) -> dict[str, str]:
    """Without a word of going on, in a folder with checkpoints; and a stranger's thing under a checkpoint's name."""
    job = bench.peer.job(bench.state)
    before = {path: path.read_bytes() for path in disk(job).rglob("*") if path.is_file() and path.suffix != ".txt"}
    ended = bench.peer.run(job)
    gone = sum(not path.exists() or path.read_bytes() != data for path, data in before.items())
    what = f"begins anew in silence, {gone} of {len(before)} files overwritten" if ended.code == 0 else ended.error
    job = bench.peer.job()
    place = {"transformers": "checkpoint-3/adapter_model.safetensors", "lightning": "step=3.ckpt"}
    foreign = Path(job["out"]) / place.get(bench.peer.name, "epoch_0/adapter_model.pt")
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"another tool's")
    ended = bench.peer.run(job)
    kept = foreign.exists() and foreign.read_bytes() == b"another tool's"
    stranger = ("left as it is" if kept else "overwritten in silence") if ended.code == 0 else ended.error
    return {
        "test_an_unfinished_run_is_not_begun_anew_in_silence": what,
        "test_the_other_tool_s_checkpoint_is_left_as_it_is": stranger,
    }
