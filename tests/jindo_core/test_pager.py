"""Pages and the pager: what is stored comes back, whatever the order, the place and the budget."""

from __future__ import annotations

import gc
import mmap
import os
import random
import subprocess
import sys
import tempfile
from collections import deque

import pytest
import torch

from jindo_core import pager as pager_module
from jindo_core import pages
from jindo_core.errors import InputError
from jindo_core.pager import Pager
from jindo_core.pages import PageStore, available_ram, store_for

CPU = torch.device("cpu")
PAGE = 1 << 16


@pytest.fixture(params=["host", "file"])
def place(request, tmp_path):
    return "host" if request.param == "host" else tmp_path


def make(place, *, units=7, unit_bytes=PAGE * 2 + 100, resident=2, slots=2):
    store = PageStore(place, page_bytes=PAGE)
    return Pager(store, CPU, units=units, unit_bytes=unit_bytes, resident=resident, slots=slots)


def test_a_store_s_pages_are_zeros_and_stay(place):
    store = PageStore(place, page_bytes=PAGE)
    store.reserve(2)
    assert store.nbytes == 2 * PAGE
    assert not store.page(1).any()
    store.page(1).fill_(7)
    store.reserve(5)
    store.reserve(1)
    assert len(store) == 5
    assert (store.page(1) == 7).all()
    assert not store.page(0).any()
    assert not store.page(4).any()


def test_a_file_has_no_name_and_goes(tmp_path):
    store = PageStore(tmp_path, page_bytes=PAGE)
    store.reserve(3)
    assert list(tmp_path.iterdir()) == []
    held = store.page(0)
    open_before = len(os.listdir("/proc/self/fd"))
    store.close()
    held.fill_(1)  # still good
    del held
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) < open_before


def test_many_pages_hold_few_files_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    store = PageStore(tmp_path, page_bytes=PAGE)
    store.reserve(500)
    assert len(os.listdir("/proc/self/fd")) <= before + 2


@pytest.mark.parametrize("folder", ["missing", "file"])
def test_a_folder_that_can_t_be_used_is_refused(tmp_path, folder):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"can't be written to \(.*\): give another"):
        PageStore(tmp_path / folder)


@pytest.mark.parametrize("place", ["", None, 3])
def test_a_place_that_is_none_is_refused(place):
    with pytest.raises(InputError, match=f"got the place {place!r}: expected 'host' or a folder"):
        PageStore(place)


def test_the_host_s_place_beside_a_cpu_and_a_gpu(tmp_path, monkeypatch):
    """A CPU's RAM is the device itself: what goes to its host goes to a file."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    beside_cpu, named = store_for(CPU), store_for(CPU, tmp_path / "..")
    for store, folder in ((beside_cpu, tmp_path), (named, tmp_path.parent)):
        assert os.path.dirname(os.readlink(f"/proc/self/fd/{store._file}")) == str(folder)
    beside_gpu = store_for(torch.device("cuda"))
    assert (beside_gpu._folder, beside_gpu._pin) == (None, True)


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    store = PageStore(tmp_path, page_bytes=PAGE)
    store.reserve(2)

    def full(fd, start, length):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"no room for 0 MiB .No space left on device.: give another"):
        store.reserve(3)
    assert len(store) == 2


def test_too_little_ram_is_an_error(monkeypatch):
    monkeypatch.setattr(pages, "available_ram", lambda: 3 << 20)
    store = PageStore("host")
    with pytest.raises(InputError, match="needs 4 MiB of RAM, 3 MiB are free"):
        store.reserve(1)


GROUPS = {  # /proc/self/cgroup, the groups' files, the bytes that are left
    "v2": ("0::/a/b\n", {"a/b/memory.max": "max", "a/b/memory.current": "9", "a/memory.max": "5000",
                         "a/memory.current": "3000", "a/memory.stat": "anon 1\ninactive_file 700\n"}, 2700),
    "v2, a container's own": ("0::/machine/c1\n", {"memory.max": "4000", "memory.current": "4100"}, 0),
    "v1": ("9:name=systemd:/\n4:cpu,memory:/x\n", {"memory/x/memory.limit_in_bytes": "8000",
           "memory/x/memory.usage_in_bytes": "3000", "memory/x/memory.stat": "inactive_file 1\ntotal_inactive_file 50"},
           5050),
    "no limit": ("4:memory:/x\n0::/\n", {"memory/memory.limit_in_bytes": "9223372036854771712",
                 "memory/memory.usage_in_bytes": "3000"}, 1 << 20),
    "no groups": (None, {}, 1 << 20),
}  # fmt: skip


@pytest.mark.parametrize("kind", GROUPS)
def test_free_ram_heeds_the_control_groups(kind, tmp_path):
    listed, files, left = GROUPS[kind]
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    for path, text in {proc / "meminfo": "MemTotal: 9 kB\nMemAvailable: 1024 kB\n", proc / "self" / "cgroup": listed,
                       **{groups / name: text for name, text in files.items()}}.items():  # fmt: skip
        if text is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    assert available_ram(proc, groups) == left


def test_free_ram_where_the_system_does_not_say(tmp_path):
    assert available_ram(tmp_path, tmp_path) is None


class Moment:
    """The end of a launch."""

    def __init__(self, owner):
        self.owner, self.over = owner, False

    def synchronize(self):
        while not self.over:
            self.owner.run(1)


class LateCopies:
    """In place of the pager's thread, what a GPU may do: three streams, whose work is done late and in any order that
    the stream's own and the moments it waits for allow."""

    order = random.Random()

    def __init__(self):
        self.streams = [deque(), deque(), deque()]  # computation, in, out

    def launch(self, stream=0, work=None, after=()):
        moment = Moment(self)
        self.streams[stream].append((work, list(after), moment))
        return moment

    def run(self, tries):
        for _ in range(tries):
            stream = self.order.choices(self.streams, (4, 4, 1))[0]  # the way out is the latest
            if stream and all(moment.over for moment in stream[0][1]):
                work, _, moment = stream.popleft()
                if work is not None:
                    work()
                moment.over = True

    def mark(self):
        return self.launch()

    def copy(self, cuts, before, out):
        return self.launch(2 if out else 1, lambda: [target.copy_(source) for source, target in cuts], before)

    def wait(self, moment):
        self.launch(after=[moment])

    def stalled(self):
        return 0.0


@pytest.mark.parametrize("seed", range(40))
def test_any_order_of_use_on_a_device_that_is_late(seed, monkeypatch, tmp_path):
    """As `test_any_order_of_use`, held against what each use should find; nothing but events keeps copies in order.
    On the way the store moves to a file, whatever is under way then."""
    monkeypatch.setattr(pages, "_KEPT_IN_RAM", set())  # the tests' folder may lie there
    order = LateCopies.order = random.Random(seed)
    monkeypatch.setattr(pager_module, "_Thread", LateCopies)
    store = PageStore("host", page_bytes=mmap.PAGESIZE)
    unit_bytes, move_at = 3 * mmap.PAGESIZE // 2, order.randrange(1, 200)
    pager = Pager(store, CPU, units=6, unit_bytes=unit_bytes, resident=order.randrange(3), slots=order.choice([2, 3]))
    late, wanted, wrong = pager._copier, [0] * 6, []

    def use(turn, buffer, found, new):
        if not (buffer == found).all():
            wrong.append(turn)
        buffer.fill_(new)

    def read(turn, buffer, found):
        if not (buffer == found).all():
            wrong.append(turn)

    for turn in range(1, 200):
        unit = order.randrange(6)
        buffer, found = pager.get(unit), wanted[unit]
        pager.ahead(order.randrange(6))
        changed = order.random() < 0.5
        if changed:
            wanted[unit] = turn
            late.launch(0, lambda t=turn, b=buffer, f=found: use(t, b, f, t))
        else:
            late.launch(0, lambda t=turn, b=buffer, f=found: read(t, b, f))
        pager.done(unit, changed=changed)
        if turn == move_at:
            assert pager.move_to(tmp_path) == store.nbytes
        late.run(order.randrange(8))
        if order.random() < 0.02:
            late.mark().synchronize()  # these copy on the stream that computes
            pager.evict(order.randrange(3))
            pager.grow(order.randrange(4))
        if order.random() < 0.02:
            late.mark().synchronize()
            unit = order.randrange(6)
            assert (pager.read(unit) == wanted[unit]).all()
            wanted[unit] = turn
            pager.write(unit, 0, torch.full((unit_bytes,), turn, dtype=torch.uint8))
    late.mark().synchronize()
    assert wrong == []
    assert not store.in_ram
    assert [int(pager.read(unit).unique()) for unit in range(6)] == wanted


@pytest.mark.parametrize("resident", [0, 2, 7])
@pytest.mark.parametrize("slots", [2, 3])
def test_any_order_of_use(place, resident, slots):
    """Held against a plain list: random gets, changes, hints, evictions and regrowths."""
    pager, order = make(place, resident=resident, slots=slots), random.Random(resident)
    wanted = [0] * 7
    for turn in range(300):
        unit = order.randrange(7)
        buffer = pager.get(unit)
        assert buffer.shape == (PAGE * 2 + 100,)
        assert (buffer == wanted[unit]).all(), turn
        pager.ahead(order.randrange(-1, 9))
        changed = order.random() < 0.5
        if changed:
            wanted[unit] = turn % 251
            buffer.fill_(wanted[unit])
        pager.done(unit, changed=changed)
        if order.random() < 0.05:
            pager.evict(order.randrange(4))
        if order.random() < 0.05:
            pager.grow(order.randrange(8))
    pager.evict()
    pager.flush()
    for unit in range(7):
        stored = torch.cat(pager.pages_of(unit))[: pager.unit_bytes]
        assert (stored == wanted[unit]).all()


def test_all_buffers_in_use_is_an_error():
    pager = make("host", resident=0)
    pager.get(0)
    pager.get(1)
    with pytest.raises(RuntimeError, match="all 2 buffers are in use"):
        pager.get(2)


def test_what_is_ahead_is_not_dropped_before_its_turn():
    pager = make("host", resident=0, slots=3)
    pager.ahead(1)
    pager.ahead(2)
    pager.ahead(3)
    pager.ahead(4)  # no buffer left: only a hint
    for unit in (1, 2, 3):
        pager.get(unit)
    assert pager.counters.pages_in == 3 * 3


def test_the_counters():
    pager = make("host", resident=2)
    for unit in range(7):
        pager.get(unit)
        pager.done(unit, changed=unit % 2 == 0)
    found = pager.counters
    assert found.pages_in == 5 * 3
    assert found.bytes_in == 5 * (PAGE * 2 + 100)
    assert found.pages_out == 3 * 3
    assert found.stall_seconds > 0
    assert pager.evict() == 2 * (PAGE * 2 + 100)
    assert pager.counters.pages_out == 5 * 3
    assert pager.evict() == 0


def test_all_resident_needs_no_store():
    pager = make("host", resident=7)
    assert len(pager.store) == 0
    pager.evict(3)
    assert len(pager.store) == 4 * 3
    assert pager.resident == 3


def test_the_store_holds_only_what_is_not_resident():
    pager = make("host", units=100, resident=99)
    assert len(pager.store) == 3
    pager.get(98).fill_(8)
    pager.get(99).fill_(9)
    pager.done(99, changed=True)
    pager.evict(97)
    assert len(pager.store) == 3 * 3
    pager.evict(98)
    assert len(pager.store) == 3 * 3
    for unit in (98, 99):
        assert (pager.get(unit) == unit % 90).all()
        pager.done(unit, changed=False)


def test_what_is_written_replaces_what_a_buffer_holds(place):
    pager = make(place, resident=1)
    for unit in (0, 3):
        pager.get(unit)
        pager.done(unit, changed=False)
        pager.write(unit, 5, torch.full((PAGE,), 6, dtype=torch.uint8))
        for found in (pager.read(unit), pager.get(unit)):
            assert not found[:5].any()
            assert (found[5 : 5 + PAGE] == 6).all()
            assert not found[5 + PAGE :].any()


def test_closing_waits_and_gives_everything_back(tmp_path):
    pager = make(tmp_path, resident=1)
    pager.get(3).fill_(1)
    pager.done(3, changed=True)
    pager.ahead(4)
    held = pager.pages_of(3)[0]
    pager.close()
    assert (held == 1).all()
    assert (len(pager.store), pager.store._file, pager._resident, pager._slots) == (0, -1, [], [])


def test_a_store_without_room_leaves_the_resident_where_they_are(monkeypatch):
    pager = make("host", resident=7)
    pager.get(3).fill_(9)
    monkeypatch.setattr(pages, "available_ram", lambda: 0)
    with pytest.raises(InputError):
        pager.evict()
    assert (pager.resident, len(pager.store)) == (7, 0)
    assert (pager.get(3) == 9).all()


def test_a_store_that_outlives_its_program_ends_in_silence(tmp_path):
    """Its file is closed without the modules that the interpreter may have taken down by then."""
    code = f"""
import sys, torch
from jindo_core.pages import PageStore
store = PageStore({str(tmp_path)!r})
store.reserve(2)
sys.modules["kept"] = store  # as a global of the main program: torn down last
sys.store = store
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
