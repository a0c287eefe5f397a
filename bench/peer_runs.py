"""The runs of bench/peer_faults.py: a peer's server, its jobs, and what became of them."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

BENCH = Path(__file__).resolve().parent
SAVES = {"transformers": (3, 6), "lightning": (3, 6), "torchtune": (5, 10)}
"""After which steps a run has a checkpoint that it can go on from; it is killed one or two steps after the second."""
DIES = {"transformers": 7, "lightning": 7, "torchtune": 12}
LIMIT = 240.0
"""Seconds for one run: one takes a few, more where the machine is busy."""


@dataclasses.dataclass
class Ended:
    """code: exit code, minus a signal, or None after LIMIT; words: its last; report: {} if it was never written."""

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
                stdout=words, stderr=subprocess.STDOUT, env=self.environment, start_new_session=True,
            )  # fmt: skip

    def wait(self, job: dict[str, Any], process: subprocess.Popen[bytes], limit: float = LIMIT) -> Ended:
        """Until it has ended; after `limit` seconds it is killed with all that it started."""
        code: int | None = None
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            for row in _progress(job):  # torchrun gives each rank a session of its own
                if Path(f"/proc/{row['pid']}").exists():
                    os.kill(row["pid"], signal.SIGKILL)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return _ended(job, code, Path(job["report"]).with_name("log"))

    def close(self) -> None:
        self.server.stdin.close()  # type: ignore[union-attr]
        self.server.wait()

    def files(self, state: Path) -> list[str]:
        """The files of the newest checkpoint below a `disk` that going on from it reads."""
        if self.name == "lightning":
            return ["out/last.ckpt"]
        if self.name == "torchtune":  # the others of epoch_1 are for who loads it elsewhere
            return ["out/epoch_1/adapter_model.pt", "out/recipe_state/recipe_state.pt"]
        folder = Path("out") / f"checkpoint-{SAVES[self.name][1]}"
        return [str(folder / path.name) for path in sorted((state / folder).iterdir()) if path.suffix != ".md"]


def _ended(job: dict[str, Any], code: int | None, log: Path) -> Ended:
    report = Path(job["report"])
    held = json.loads(report.read_text()) if report.exists() else {}
    return Ended(code, log.read_text(errors="replace")[-6000:], held, _progress(job))


def _progress(job: dict[str, Any]) -> list[dict[str, Any]]:
    path = Path(job["progress"])
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def disk(job: dict[str, Any]) -> Path:
    return Path(job["out"]).parent


def sampled(first: int, last: int, most: int) -> list[int]:
    """At most `most` of first … last - 1, evenly."""
    return sorted({int(place) for place in np.linspace(first, last - 1, min(most, last - first))})


class Bench:
    """One peer, its run that nothing befalls (`whole`), and the disk of one that was killed (`state`)."""

    def __init__(self, peer: Peer, few: bool) -> None:
        self.peer, self.few = peer, few
        peer.run(peer.job(modules=str(peer.work / "modules")))
        self.whole = peer.run(peer.job())
        if self.whole.code != 0:
            raise RuntimeError(f"{peer.name} can't run here: {self.whole.words[-500:]}")
        killed = peer.job(die_at=DIES[peer.name])
        peer.run(killed)
        self.state = disk(killed)
        self.detail: dict[str, Any] = {}
        # Not every peer resumes exactly: what is damaged is held to what is not.
        self.intact = self.resume(peer.job(self.state)).report["digest"]

    def resume(self, job: dict[str, Any], **changes: Any) -> Ended:
        """The same command again, with what the peer has for going on."""
        Path(job["report"]).unlink(missing_ok=True)
        Path(job["progress"]).unlink(missing_ok=True)
        clean = {name: value for name, value in job.items() if name not in ("disk", "die_at", "nan_at")}
        return self.peer.run(clean | {"resume": True} | changes)

    def became(self, ended: Ended) -> str:
        """What a resumed run did, in a word or two."""
        if ended.code != 0:
            return "hangs" if ended.code is None else f"error: {ended.error}"
        older, newest = SAVES[self.peer.name]
        report = ended.report
        if report["start"] == newest and report["digest"] not in (self.whole.report["digest"], self.intact):
            return "taken, with another result"
        begun = {0: "afresh", older: "from the one before"}
        return begun.get(report["start"], "from the newest")

    def same(self, ended: Ended) -> bool:
        """Whether it ended as the run that nothing befell."""
        return ended.code == 0 and ended.report["digest"] == self.whole.report["digest"]

    def boundaries(self, step: int) -> tuple[int, int]:
        """Those between the gradients of a step and of the next: its save."""
        at = {row["step"]: row["boundaries"] for row in self.whole.progress}
        return at[step], at[step + 1]


def tally(words: list[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in collections.Counter(words).most_common())


def kinds(words: list[str]) -> str:
    """The same with errors together, whatever their kind."""
    return tally(["with an error" if word.startswith("error") else word for word in words])
