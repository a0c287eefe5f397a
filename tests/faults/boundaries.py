"""Kills a process at its n-th write: run as a script by test_kills.py, in a process of its own that has one thread.

A boundary is just before anything that changes the disk under a folder: a write (of which half is done), an fsync, a
rename, a removal, a new folder. Children are forked, so that torch is imported once.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from jindo_core import checkpoint
from jindo_core.adapters import WEIGHTS
from jindo_core.cli.main import main
from jindo_core.errors import InputError
from jindo_core.resume import Saver


class Boundaries:
    """Counts what is written under a folder, and kills this process at one of them; kill_at: -1 for none."""

    def __init__(self, folder, kill_at):
        self.folder, self.kill_at, self.count = str(folder), kill_at, 0

    def install(self):
        for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
            setattr(os, name, self._before(getattr(os, name)))
        builtins.open = io.open = self._opening(io.open)
        return self

    def reached(self):
        self.count += 1
        return self.count - 1 == self.kill_at

    def concerns(self, place):
        path = os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else os.fspath(place)
        # rmtree removes by names relative to a folder's descriptor.
        return str(path).startswith(self.folder) or not os.path.isabs(path)

    def _before(self, operation):
        def counted(place, *rest, **more):
            if self.concerns(place) and self.reached():
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(place, *rest, **more)

        return counted

    def _opening(self, original):
        def opening(place, mode="r", *rest, **more):
            file = original(place, mode, *rest, **more)
            writes = any(letter in mode for letter in "wxa+")
            return Halved(file, self) if writes and self.concerns(file.fileno()) else file

        return opening


class Halved:
    """A file whose writes are boundaries: the one that kills has done its first half."""

    def __init__(self, file, boundaries):
        self._file, self._boundaries = file, boundaries

    def write(self, data):
        if self._boundaries.reached():
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        done = self._file.write(data)
        self._file.flush()  # or else a kill would show what the disk held much earlier
        return done

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *error):
        return self._file.__exit__(*error)


def forked(run):
    """run() in a child, and how that ended: an exit code, or minus a signal."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = run()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def damaged(output_dir):
    """What is wrong with each of the folders that have a checkpoint's name."""
    found = []
    for folder in checkpoint.folders(output_dir):
        try:
            checkpoint.read(folder)
        except InputError as error:
            found.append(str(error))
    return found


def sweep_a_save(output_dir, argv):
    """Train; at the save of step 3 with one of step 2 there, kill a child at each boundary of it in turn."""
    original, copy, seen = Saver.save, output_dir.with_name("before"), []

    def sweeping(saver, state):
        if state.step != 3:
            return original(saver, state)
        shutil.copytree(output_dir, copy)
        ended = -signal.SIGKILL
        while ended == -signal.SIGKILL:
            ended = forked(lambda: save_and_die(saver, state, len(seen)))
            found, faults = checkpoint.newest(output_dir)
            faults += damaged(output_dir)
            checkpoint.clear(output_dir)
            names = sorted(path.name for path in output_dir.iterdir())
            seen.append({"ended": ended, "step": found and found.step, "faults": faults, "names": names})
            shutil.rmtree(output_dir)
            shutil.copytree(copy, output_dir)
        return original(saver, state)

    def save_and_die(saver, state, boundary):
        Boundaries(output_dir, boundary).install()
        original(saver, state)
        return 0

    Saver.save = sweeping
    return {"code": main(argv), "seen": seen}


def kill_runs(output_dir, argv, chosen):
    """For each chosen boundary of a whole run: kill one there, take it up again. chosen: shares of all of them."""

    def run(boundary, more=()):
        counted = Boundaries(output_dir, boundary).install()
        code = main([*argv, *more])
        counted_in.write_text(str(counted.count))
        return code

    counted_in = output_dir.with_name("count")
    adapter, found = output_dir / WEIGHTS, []
    assert run(-1) == 0  # here, so that the children find all imported
    whole, total = adapter.read_bytes(), int(counted_in.read_text())
    for boundary in sorted({min(int(share * total), total - 1) for share in chosen}):
        shutil.rmtree(output_dir)
        killed = forked(lambda at=boundary: run(at, ["--resume"]))
        resumed = forked(lambda: run(-1, ["--resume"]))
        same = adapter.exists() and adapter.read_bytes() == whole
        steps = [json.loads(line)["step"] for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
        found.append({"boundary": boundary, "killed": killed, "resumed": resumed, "same": same, "steps": steps})
    return {"total": total, "runs": found}


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    output = Path(job["output_dir"])
    out = sys.stdout
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the runs' own words
    answer = sweep_a_save(output, job["argv"]) if "shares" not in job else kill_runs(output, job["argv"], job["shares"])
    out.write(json.dumps(answer))
