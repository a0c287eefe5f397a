"""Pages and the pager: what is stored comes back, whatever the order, the place and the budget."""

from __future__ import annotations

import gc
import os
import random

import pytest
import torch

from jindo_core import pages
from jindo_core.errors import InputError
from jindo_core.pager import Pager
from jindo_core.pages import PageStore

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


def test_a_store_without_room_leaves_the_resident_where_they_are(monkeypatch):
    pager = make("host", resident=7)
    pager.get(3).fill_(9)
    monkeypatch.setattr(pages, "available_ram", lambda: 0)
    with pytest.raises(InputError):
        pager.evict()
    assert pager.resident == 7
    assert (pager.get(3) == 9).all()
