"""A host that runs out of memory: what counts as free, what gives way, and that no bit changes by it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from jindo_core import checkpoint, head, host_memory, paged_adamw, pager, pages, recompute, streaming
from jindo_core import train as training
from jindo_core.adapters import WEIGHTS
from jindo_core.errors import InputError, Stopped
from jindo_core.host_memory import LEAST, TRY_AGAIN, margin, shortest
from jindo_core.memory import give_back_freed
from jindo_core.pages import Limit, PageStore
from jindo_core.train import train

GB = 10**9


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_text(text)
        path.with_suffix(".part").rename(path)  # who reads it meanwhile finds all of it, as in a kernel's


class Host:
    """/proc and the control groups of a machine of 8 GB, whose one group may hold 4 GB."""

    def __init__(self, root):
        self.proc, self.cgroups = root / "proc", root / "groups"
        self.set()

    def set(self, *, machine=7.0, used=1.0, idle=0.0, busy=0.0, high="max", version=2):
        """In GB: what the machine has left, what the group uses, and of that page cache."""
        write(self.proc, {"meminfo": f"MemTotal: 8000000 kB\nMemAvailable: {int(machine * 1e6)} kB\n"})
        numbers = [int(x * GB) for x in (used, idle, busy)]
        if version == 2:
            said = f"anon 1\ninactive_file {numbers[1]}\nactive_file {numbers[2]}\n"
            files = {"memory.max": str(4 * GB), "memory.high": str(high), "memory.current": str(numbers[0])}
            write(self.proc, {"self/cgroup": "0::/job\n"})
            write(self.cgroups / "job", {**files, "memory.stat": said})
        else:
            said = f"inactive_file 1\nactive_file 1\ntotal_inactive_file {numbers[1]}\ntotal_active_file {numbers[2]}\n"
            write(self.proc, {"self/cgroup": "4:memory:/job\n"})
            files = {"memory.limit_in_bytes": str(4 * GB), "memory.usage_in_bytes": str(numbers[0])}
            write(self.cgroups / "memory" / "job", {**files, "memory.stat": said})


@pytest.fixture
def host(tmp_path, monkeypatch):
    """In place of the machine's own; each look counts, without a pause."""
    made = Host(tmp_path / "host")
    monkeypatch.setattr(host_memory, "PROC", made.proc)
    monkeypatch.setattr(host_memory, "CGROUPS", made.cgroups)
    monkeypatch.setattr(host_memory, "INTERVAL", 0.0)
    monkeypatch.setattr(host_memory, "SETTLE", 0.0)
    return made


@pytest.fixture
def on_disk(monkeypatch):
    """The tests' own folder may lie on a tmpfs."""
    monkeypatch.setattr(pages, "_KEPT_IN_RAM", set())


# --- what is short ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("said", "short"),
    [
        ({}, False),
        ({"used": 3.7}, False),
        ({"used": 3.8}, True),
        ({"used": 4.0, "idle": 0.5}, False),  # merely read from a disk
        ({"used": 4.0, "busy": 0.5}, False),
        ({"used": 4.0, "idle": 0.1, "busy": 0.1}, True),
        ({"machine": 0.3}, False),
        ({"machine": 0.2}, True),
    ],
)
def test_what_is_short_and_what_is_page_cache(said, short, version, host):
    host.set(**said, version=version)
    assert (shortest(host.proc, host.cgroups) is not None) == short


def test_a_group_that_is_throttled_before_it_is_full(host):
    host.set(used=2.8, high=3 * GB)
    found = shortest(host.proc, host.cgroups)
    assert (found.most, found.left) == (3 * GB, GB // 5)


def test_the_margin_is_a_share_within_bounds():
    found = [margin(Limit(most, 0)) for most in (GB, 4 * GB, 50 * GB, 900 * GB)]
    assert found == [GB // 10, LEAST, 3 * GB // 2, 2 << 30]


def broken_group(host):
    """What a group says is no number; another of its files is a folder."""
    write(host.cgroups / "job", {"memory.max": "many"})
    write(host.proc, {"self/cgroup": "0::/job\n0::/other\n"})
    write(host.cgroups / "other", {"memory.max": str(4 * GB)})
    (host.cgroups / "other" / "memory.current").mkdir()


def test_a_limit_that_can_t_be_read_is_passed_over(host):
    broken_group(host)
    said = []
    host_limits = list(pages.limits(host.proc, host.cgroups, said.append))
    assert host_limits == [Limit(8_000_000 << 10, 7_000_000 << 10)], "the machine's"
    assert len(said) == 2
    assert "invalid literal for int() with base 10: 'many'" in said[0]
    assert "memory.current: Is a directory" in said[1]
    assert pages.available_ram(host.proc, host.cgroups) == 7_000_000 << 10
    (host.proc / "meminfo").write_bytes(b"MemAvailable:\n\xff\n")
    assert shortest(host.proc, host.cgroups) is None
    (host.proc / "self" / "cgroup").unlink()
    (host.proc / "self" / "cgroup").mkdir()
    said.clear()
    assert list(pages.limits(host.proc, host.cgroups, said.append)) == []
    assert ["Is a directory" in why for why in said] == [True, False]


def test_a_run_whose_limits_can_t_be_read_goes_on_and_says_so_once(settings, host, capsys):
    broken_group(host)
    assert train(*settings("out", max_steps=3)).steps == 3
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("can't be read (invalid literal for int() with base 10: 'many'): that limit of memory is") == 1


# --- page stores --------------------------------------------------------------------------------------------


def filled(place="host", count=40, page_bytes=1 << 16):
    store = PageStore(place, page_bytes=page_bytes)
    store.reserve(count)
    for i in range(count):
        store.page(i).fill_(i + 1)
    return store


def holds(store, count=40):
    return all(bool((store.page(i) == i + 1).all()) for i in range(count))


@pytest.mark.usefixtures("on_disk")
def test_a_store_moves_with_all_it_holds(tmp_path):
    store = filled()
    held = store.page(3)
    assert store.in_ram
    assert store.move_to(tmp_path) == 40 << 16
    assert not store.in_ram
    assert holds(store)
    assert (held == 4).all()
    store.reserve(42)
    store.page(41).fill_(9)
    assert holds(store)
    assert list(tmp_path.iterdir()) == []
    open_before = len(os.listdir("/proc/self/fd"))
    store.close()
    assert len(os.listdir("/proc/self/fd")) < open_before


@pytest.mark.usefixtures("on_disk")
def test_ram_is_free_behind_a_store_that_moved(tmp_path):
    def anonymous():
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10

    store = filled(count=16, page_bytes=4 << 20)
    before = anonymous()
    store.move_to(tmp_path)
    give_back_freed()  # as the watch does: what is freed is the C library's to keep, by what the process did before
    assert before - anonymous() > 15 * (4 << 20)
    assert holds(store, 16)


@pytest.mark.usefixtures("on_disk")
@pytest.mark.parametrize("fails", ["posix_fallocate", "pwrite", "fdatasync"])
def test_a_disk_that_fails_loses_no_page(fails, tmp_path, monkeypatch):
    store, original, calls = filled(), getattr(os, fails), []

    def broken(*given):
        calls.append(given)
        if fails != "pwrite" or len(calls) == 20:
            raise OSError(5, "Input/output error")
        return original(*given)

    monkeypatch.setattr(os, fails, broken)
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(InputError, match="Input/output error"):
        store.move_to(tmp_path)
    assert holds(store)
    monkeypatch.setattr(os, fails, original)
    store.reserve(41)
    assert store.move_to(tmp_path) == 41 << 16
    assert holds(store)
    store.close()
    del store
    assert len(os.listdir("/proc/self/fd")) <= open_before + 1


def test_a_folder_in_ram_is_told_from_one_on_a_disk(tmp_path, monkeypatch):
    """Held against coreutils' stat."""
    for folder in (tmp_path, Path("/dev/shm"), Path("/proc"), Path("/")):
        named = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True, check=True)
        assert pages.lies_in_ram(folder) == (named.stdout.strip() in ("tmpfs", "ramfs", "hugetlbfs")), folder
    assert not pages.lies_in_ram(tmp_path / "missing")
    store = filled()
    monkeypatch.setattr(pages, "lies_in_ram", lambda _: True)
    with pytest.raises(InputError, match="lies in RAM itself: give one on a disk"):
        store.move_to(tmp_path)
    assert holds(store)


@pytest.mark.usefixtures("on_disk")
def test_a_pager_s_units_move_behind_what_is_under_way(tmp_path):
    found = pager.Pager(PageStore(page_bytes=1 << 16), torch.device("cpu"), units=6, unit_bytes=100_000, resident=1)
    for unit in range(6):
        found.get(unit).fill_(unit + 1)
        if unit == 3:
            with pytest.raises(RuntimeError, match="a unit is in use"):
                found.move_to(tmp_path)
        found.done(unit, changed=True)
    found.ahead(2)
    assert found.move_to(tmp_path) == 5 * 2 << 16
    assert found.move_to(tmp_path) == 0
    assert [int(found.read(unit).unique()) for unit in range(6)] == [1, 2, 3, 4, 5, 6]
    found.evict()
    assert [int(found.get(unit).unique()) for unit in (0, 2)] == [1, 3]


# --- a run --------------------------------------------------------------------------------------------------


@pytest.fixture
def at_step(host, monkeypatch):
    """at_step({3: {...}, 5: {...}}): how the host stands from those steps on."""

    def arrange(changes):
        original = training.take_step

        def stepping(job, batches, number, *rest):
            taken = original(job, batches, number, *rest)
            if number in changes:
                host.set(**changes[number])
            return taken

        monkeypatch.setattr(training, "take_step", stepping)

    return arrange


@pytest.fixture
def in_ram(monkeypatch):
    """Beside this CPU, "host" is RAM, as beside a GPU; what was moved is in the list."""
    moved, original = [], PageStore.move_to

    def store_for(device, place="host", *, page_bytes=pages.PAGE_BYTES):
        return PageStore(place, page_bytes=page_bytes)

    def counted(store, folder):
        moved.append(original(store, folder))
        return moved[-1]

    for module in (paged_adamw, streaming, recompute, head):
        monkeypatch.setattr(module, "store_for", store_for)
    monkeypatch.setattr(PageStore, "move_to", counted)
    return moved


def same(tmp_path, *names):
    first, *others = [(tmp_path / name / WEIGHTS).read_bytes() for name in names]
    return all(other == first for other in others)


OUTSIDE = {
    "resident_optimizer_MB": 0, "offload_layers": 2, "gradient_checkpointing": True, "offload_checkpoints": True,
    "offload_head": True,
}  # fmt: skip


@pytest.mark.usefixtures("on_disk")
def test_page_stores_move_to_a_file_and_no_bit_changes(settings, at_step, in_ram, capsys, tmp_path):
    """One at a time, each said once; those that have moved stay, and nothing moves while there is room."""
    train(*settings("whole", **OUTSIDE))
    assert in_ram == []
    at_step({2: {"used": 3.8}, 3: {}, 4: {"used": 3.8}, 7: {}})
    train(*settings("out", **OUTSIDE))
    assert same(tmp_path, "whole", "out")
    assert len(in_ram) == 4
    said = " ".join(capsys.readouterr().out.split())
    said = re.findall(r"step (\d): 200 of 4,000 MB of memory are left, .*? kept: \d+ MB of (.+?) move", said)
    assert said == [("2", "AdamW's moments"), ("4", "the head"), ("5", "layers' inputs"), ("6", "layers' weights")]


@pytest.mark.usefixtures("on_disk", "in_ram")
def test_all_moves_at_once_where_little_is_left(settings, at_step, in_ram, tmp_path):
    at_step({2: {"used": 3.95}})
    with pytest.raises(Stopped, match=r"for want of memory \(50 of 4,000 MB of memory are left") as stopped:
        train(*settings("out", **OUTSIDE))
    assert stopped.value.code == TRY_AGAIN == 75
    assert len(in_ram) == 4
    assert [found.name for found in checkpoint.folders(tmp_path / "out")] == ["checkpoint-2"]


@pytest.mark.usefixtures("on_disk")
def test_beside_a_cpu_moments_and_layers_go_then_the_run_stops_and_goes_on(settings, at_step, host, capsys, tmp_path):
    """Moments, then layers a quarter at a time; a checkpoint, the code for "try again"; and the same bytes at last."""
    train(*settings("whole"))
    at_step({1: {"used": 3.8}})
    with pytest.raises(Stopped, match=r"nothing is left that could give way\) after step 6: ") as stopped:
        train(*settings("out", save_steps=0))
    assert stopped.value.code == 75
    said = " ".join(capsys.readouterr().out.split())
    assert "MB of AdamW's moments go to the host" in said
    assert "5 of 5 layers" in said
    host.set()
    train(*settings("out", save_steps=0, resume=True))
    assert same(tmp_path, "whole", "out")


@pytest.mark.usefixtures("on_disk")
def test_somebody_else_s_short_need_moves_no_more_than_it_must(settings, at_step, capsys, tmp_path):
    """Short for a moment with nothing left to give: the run goes on."""
    more = {"optim": "adamw_torch", "quantize": "none"}  # neither moments nor layers can go
    train(*settings("whole", **more))
    at_step({2: {"used": 3.8}, 3: {}, 5: {"used": 3.8}, 6: {}})
    train(*settings("out", **more))
    assert same(tmp_path, "whole", "out")
    at_step({4: {"used": 3.8}})
    with pytest.raises(Stopped, match="after step 5: "):
        train(*settings("third", **more))


def test_a_folder_in_ram_is_named_where_the_run_stops(settings, at_step, monkeypatch):
    monkeypatch.setattr(host_memory, "lies_in_ram", lambda _: True)
    at_step({3: {"machine": 0.05}})
    with pytest.raises(Stopped, match=r"51 of 8,192 MB .* lies in RAM itself: give --offload_folder, or TMPDIR"):
        train(*settings("out"))


def test_the_files_are_read_once_a_second_at_most(host, monkeypatch):
    seen, now = [], [0.0]
    monkeypatch.setattr(host_memory, "shortest", lambda *_: seen.append(now[0]))
    monkeypatch.setattr(host_memory, "INTERVAL", 1.0)
    watch = host_memory.HostWatch(None, None, None, "/", clock=lambda: now[0])
    for step in range(100):
        now[0] = step / 10
        assert watch.look(step, pytest.fail) is None
    assert len(seen) == 10


# --- a real one ---------------------------------------------------------------------------------------------

RUN = """
import sys
from pathlib import Path
from jindo_core import host_memory, pages
from jindo_core.cli.main import main
host_memory.PROC, host_memory.CGROUPS = Path({proc!r}), Path({cgroups!r})
host_memory.INTERVAL = 0.1
pages._KEPT_IN_RAM = set()
sys.exit(main({argv!r}))
"""


def anonymous(process):
    found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
    return int(found[1]) << 10 if found else 0


def under_a_shrinking_limit(stories260k, rows, root, *, watched):
    """A run in a group whose limit falls by 6 MB with every look at it, in which this process is the kernel: it counts
    what the run holds, and kills it where that is more. Its exit code."""
    group, out = root / "groups", root / "out"
    write(root / "proc", {"self/cgroup": "0::/\n"})
    argv = [
        "train", "--base_model", str(stories260k), "--data_path", str(rows), "--output_dir", str(out), "--resume",
        "--batch_size", "8", "--micro_batch_size", "4", "--max_steps", "100000", "--cutoff_len", "96",
        "--val_set_size", "0", "--device", "cpu", "--prompt_template_name", "alpaca_short", "--save_steps", "0",
    ]  # fmt: skip
    proc = root / ("proc" if watched else "nothing")
    code = RUN.format(proc=str(proc), cgroups=str(group), argv=argv)
    log, limit, steps = out / "metrics.jsonl.part", 4 * GB, 0
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    write(group, {"memory.max": str(limit), "memory.current": "0"})
    until = time.monotonic() + 120
    with subprocess.Popen([sys.executable, "-c", code], env=environment, **quiet) as process:
        while process.poll() is None:
            assert time.monotonic() < until
            held, done = anonymous(process), log.read_text().count("\n") if log.exists() else 0
            if done >= 5 and done > steps:  # no faster than it can look
                limit, steps = min(limit, held + 90_000_000) - 6_000_000, done
            write(group, {"memory.current": str(held), "memory.max": str(limit)})
            if held > limit:
                process.kill()
            time.sleep(0.1)
        said = process.stderr.read()
    return process.returncode, said, out


def test_a_run_that_would_be_killed_stops_in_time(stories260k, rows, tmp_path):
    code, said, out = under_a_shrinking_limit(stories260k, rows, tmp_path, watched=True)
    assert code == TRY_AGAIN
    assert re.search(r"stopped for want of memory .* is saved, --resume goes on", said)
    found, faults = checkpoint.newest(out)
    assert faults == []
    assert found.step >= 5


@pytest.mark.slow
def test_the_same_run_that_does_not_look_is_killed(stories260k, rows, tmp_path):
    code, _, out = under_a_shrinking_limit(stories260k, rows, tmp_path, watched=False)
    assert code == -signal.SIGKILL
    assert checkpoint.folders(out) == []
