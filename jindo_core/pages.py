"""Bytes outside the device's memory, in pages of a fixed size."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jindo_core.errors import InputError

PAGE_BYTES = 4 << 20
"""What one copy moves: long enough to run at a bus's speed (0.2 ms at 25 GB/s), short enough to stage two cheaply."""


_TOGETHER = 16
"""Pages that are written before the disk is waited for, and the page cache gives them back."""

_NO_LIMIT = 1 << 62
"""From here on a group of version 1 has none: what it says then is the largest number of whole pages."""

_KEPT_IN_RAM = {0x01021994, 0x858458F6, 0x958458F6}
"""statfs' types of tmpfs, ramfs and hugetlbfs."""


class PageStore:
    """Pages in RAM or in a memory-mapped file; zeros until they are written. `store_for` chooses.

    Args:
        place: "host": RAM; else a folder, in which a file without a name lies, gone with the process whatever ends it.
        pin: lock the RAM's pages, which a GPU's copies need to run beside its kernels. A file's can't be locked: copies
            between them and a GPU go through the driver's own buffer and hold up the thread that asks for them.
        page_bytes: of one page; a multiple of the system's pages for a file.
    Raises:
        InputError: no folder is named, or it is not there or can't be written to.
    """

    def __init__(self, place: str | Path = "host", *, pin: bool = False, page_bytes: int = PAGE_BYTES) -> None:
        if not isinstance(place, str | Path) or place == "":
            raise InputError(f"the page store got the place {place!r}: expected 'host' or a folder's name")
        self.page_bytes = page_bytes
        self._pin = pin
        self._pages: list[Tensor] = []
        self._folder = None if place == "host" else Path(place).expanduser()
        self._file = -1 if self._folder is None else self._open(self._folder)
        # Not __del__, which may run when the modules it needs are gone already.
        self._closing = weakref.finalize(self, os.close, self._file) if self._file >= 0 else lambda: None

    @property
    def in_ram(self) -> bool:
        """Whether the pages take RAM that the system can't write back: also those in a folder that lies in RAM."""
        return self._folder is None or lies_in_ram(self._folder)

    def __len__(self) -> int:
        return len(self._pages)

    @property
    def nbytes(self) -> int:
        return len(self) * self.page_bytes

    def page(self, index: int) -> Tensor:
        """uint8 [page_bytes], the page itself."""
        return self._pages[index]

    def reserve(self, pages: int) -> None:
        """See to it that there are so many pages. Where there is no room, InputError, and all is as it was."""
        more = pages - len(self)
        if more <= 0:
            return
        if self._folder is None:
            self._pages += self._in_ram(more)
        else:
            self._pages += self._in_file(self._file, self._folder, self.nbytes, more)

    def move_to(self, folder: str | Path) -> int:
        """Keep the pages in a file in `folder` from now on, with what they hold; returns their bytes.

        A page at a time, so that no more than one is in RAM twice. Pages that are held elsewhere stay good, but are no
        longer the store's: no copy may be under way.

        Raises:
            InputError: a folder that lies in RAM itself, can't be written to or has no room; all is as it was. Or its
                disk fails in the middle: each page is where it was, or in the file.
        """
        folder = Path(folder).expanduser()
        if lies_in_ram(folder):
            raise InputError(f"the page store's folder {folder} lies in RAM itself: give one on a disk")
        file, size, moved = self._open(folder), self.page_bytes, self.nbytes
        try:
            new = self._in_file(file, folder, 0, len(self)) if moved else []
            for first in range(0, len(self), _TOGETHER):
                for i in range(first, min(first + _TOGETHER, len(self))):
                    _write(file, self._pages[i], i * size)
                    self._pages[i] = new[i]
                os.fdatasync(file)
                os.posix_fadvise(file, first * size, _TOGETHER * size, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            os.close(file)
            raise InputError(f"the page store's folder {folder} failed ({error.strerror}): give another") from error
        except InputError:
            os.close(file)
            raise
        self._closing()
        self._folder, self._file = folder, file
        self._closing = weakref.finalize(self, os.close, file)
        return moved

    def close(self) -> None:
        """Give everything back; pages that are still held elsewhere stay good."""
        self._pages.clear()
        if self._file >= 0:
            self._closing()
            self._file = -1

    def _in_ram(self, count: int) -> list[Tensor]:
        free, wanted = available_ram(), count * self.page_bytes
        if free is not None and wanted > free:
            raise InputError(
                f"the page store needs {wanted >> 20} MiB of RAM, {free >> 20} MiB are free: "
                "give it a folder, or a larger budget on the device"
            )
        try:
            return [torch.zeros(self.page_bytes, dtype=torch.uint8, pin_memory=self._pin) for _ in range(count)]
        except RuntimeError as error:
            raise InputError(f"the page store got no {wanted >> 20} MiB of RAM ({_first_line(error)})") from error

    def _open(self, folder: Path) -> int:
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                return os.dup(file.fileno())
        except OSError as error:
            raise InputError(
                f"the page store's folder {folder} can't be written to ({error.strerror}): give another"
            ) from error

    def _in_file(self, file: int, folder: Path, start: int, count: int) -> list[Tensor]:
        """Pages from byte `start` of the file, which ends there so far."""
        wanted = count * self.page_bytes
        try:
            # Room now, or an error now: a mapped file that meets a full disk ends the process with SIGBUS.
            os.posix_fallocate(file, start, wanted)
            mapped = mmap.mmap(file, wanted, offset=start)  # one for all: each holds a file descriptor
        except (OSError, ValueError) as error:
            os.ftruncate(file, start)
            said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise InputError(
                f"the page store's folder {folder} has no room for {wanted >> 20} MiB ({said}): give another"
            ) from error
        return list(torch.frombuffer(mapped, dtype=torch.uint8).split(self.page_bytes))


def _write(file: int, page: Tensor, start: int) -> None:
    values: Any = page.numpy()
    done = 0
    while done < len(values):
        done += os.pwrite(file, values[done:], start + done)


def store_for(device: torch.device, place: str | Path = "host", *, page_bytes: int = PAGE_BYTES) -> PageStore:
    """A store for what does not stay on `device`.

    Args:
        place: "host": pinned RAM for a GPU. A CPU's RAM is the device itself, so there it is a file in the system's
            temporary folder (TMPDIR), whose pages the kernel can write back and drop. Else a folder for the file.
    """
    pin = device.type == "cuda"
    if place == "host" and not pin:
        place = tempfile.gettempdir()
    return PageStore(place, pin=pin, page_bytes=page_bytes)


def lies_in_ram(folder: str | Path) -> bool:
    """Whether what is written to a folder stays in RAM (tmpfs), as statfs says; False where that can't be asked."""
    if sys.platform != "linux":
        return False
    found = ctypes.create_string_buffer(256)  # struct statfs is 120 bytes; its first word is the type
    if ctypes.CDLL(None).statfs(os.fsencode(folder), found):
        return False  # a folder that is not there: whoever writes to it is told
    return int.from_bytes(found.raw[:8], sys.byteorder) & 0xFFFFFFFF in _KEPT_IN_RAM


def available_ram(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that can be had without swapping, within the machine and this process's control groups; None where the
    system does not say. A limit that can't be read is none.

    Args:
        proc, cgroups: where those file systems are mounted.
    """
    found = [limit.left for limit in limits(proc, cgroups)]
    return max(min(found), 0) if found else None


class Limit(NamedTuple):
    """Of the machine or a control group, in bytes.

    Attributes:
        most: what it may hold. left: what can be had. busy: of the rest, page cache that was used of late: slow to do
            without, but taken back before any process is killed.
    """

    most: int
    left: int
    busy: int = 0


def limits(proc: Path, cgroups: Path, unread: Callable[[str], None] | None = None) -> Iterator[Limit]:
    """What bounds this process's memory: its control groups and those above them, of version 2 and 1, and the machine.

    Args:
        proc, cgroups: where those file systems are mounted.
        unread: is told why a limit can't be read, which is passed over then: its files may be hidden, or half there.
    """
    for read in (_limit_of_machine, *_groups(proc, cgroups, unread)):
        try:
            limit = read(proc)
        except _UNREADABLE as error:
            _say_unread(error, unread)
            continue
        if limit is not None:
            yield limit


_UNREADABLE = (OSError, ValueError, IndexError)
"""What reading such a file may come to: it is not this process's to read, or says what no number is."""


def _say_unread(error: Exception, unread: Callable[[str], None] | None) -> None:
    if unread is not None:
        said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        unread(f"a limit of the host's memory can't be read ({said})")


def _limit_of_machine(proc: Path) -> Limit | None:
    info = proc / "meminfo"
    lines = info.read_text(encoding="ascii").splitlines() if info.exists() else []
    held = {line.split()[0]: int(line.split()[1]) << 10 for line in lines}
    return Limit(held.get("MemTotal:", 0), held["MemAvailable:"]) if "MemAvailable:" in held else None


def _groups(
    proc: Path, cgroups: Path, unread: Callable[[str], None] | None
) -> Iterator[Callable[[Path], Limit | None]]:
    """What reads the limit of each group that this process is in or under."""
    listed = proc / "self" / "cgroup"
    try:
        lines = [line.split(":", 2) for line in listed.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:  # no Linux
        return
    except _UNREADABLE as error:
        _say_unread(error, unread)
        return
    for _, controllers, path in filter(lambda parts: len(parts) == 3, lines):
        if controllers == "":
            top, names, used, total = cgroups, ["memory.max", "memory.high"], "memory.current", ""
        elif "memory" in controllers.split(","):
            top, names, used = cgroups / "memory", ["memory.limit_in_bytes"], "memory.usage_in_bytes"
            total = "total_"
        else:
            continue
        own = top / path.lstrip("/")
        for group in (own, *own.parents):
            if not group.is_relative_to(top):
                break
            yield functools.partial(_limit_of_group, group, names, used, total)


def _limit_of_group(group: Path, names: list[str], used: str, total: str, _proc: Path) -> Limit | None:
    # A container sees its own group as the topmost one, under a path of the machine's that it can't see.
    said = [(group / name).read_text().strip() for name in names if (group / name).exists()]
    bounds = [int(bound) for bound in said if bound != "max" and int(bound) < _NO_LIMIT]
    if not bounds:
        return None
    # The page cache that nobody has used of late counts as used, but goes when asked.
    idle, busy = (_statistic(group, f"{total}{kind}_file") for kind in ("inactive", "active"))
    return Limit(min(bounds), min(bounds) - int((group / used).read_text()) + idle, busy)


def _statistic(group: Path, name: str) -> int:
    """Of memory.stat, in bytes."""
    file = group / "memory.stat"
    lines = file.read_text(encoding="ascii").splitlines() if file.exists() else []
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
