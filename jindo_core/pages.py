"""Bytes outside the device's memory, in pages of a fixed size."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from jindo_core.errors import InputError

PAGE_BYTES = 4 << 20
"""What one copy moves: long enough to run at a bus's speed (0.2 ms at 25 GB/s), short enough to stage two cheaply."""


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
        new = self._in_ram(more) if self._folder is None else self._in_file(more)
        self._pages += new

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

    def _in_file(self, count: int) -> list[Tensor]:
        start, wanted = self.nbytes, count * self.page_bytes
        try:
            # Room now, or an error now: a mapped file that meets a full disk ends the process with SIGBUS.
            os.posix_fallocate(self._file, start, wanted)
            mapped = mmap.mmap(self._file, wanted, offset=start)  # one for all: each holds a file descriptor
        except (OSError, ValueError) as error:
            os.ftruncate(self._file, start)
            said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise InputError(
                f"the page store's folder {self._folder} has no room for {wanted >> 20} MiB ({said}): give another"
            ) from error
        return list(torch.frombuffer(mapped, dtype=torch.uint8).split(self.page_bytes))


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


def available_ram(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that can be had without swapping, within the machine and this process's control groups; None where the
    system does not say.

    Args:
        proc, cgroups: where those file systems are mounted.
    """
    found = list(_left_in_cgroups(proc, cgroups))
    info = proc / "meminfo"
    if info.exists():
        lines = info.read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    return max(min(found), 0) if found else None


def _left_in_cgroups(proc: Path, cgroups: Path) -> Iterator[int]:
    """What the limits of the process's groups, and of those above them, leave; of version 2 and version 1."""
    listed = proc / "self" / "cgroup"
    for line in listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, used, cache = cgroups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, used = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        own = top / path.lstrip("/")
        for group in (own, *own.parents):
            if not group.is_relative_to(top):
                break
            # A container sees its own group as the topmost one, under a path of the machine's that it can't see.
            if (group / limit).exists() and (most := (group / limit).read_text().strip()) != "max":
                yield int(most) - int((group / used).read_text()) + _statistic(group, cache)


def _statistic(group: Path, name: str) -> int:
    """Of memory.stat, in bytes. The page cache that nobody has used of late counts as used, but goes when asked."""
    file = group / "memory.stat"
    lines = file.read_text(encoding="ascii").splitlines() if file.exists() else []
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
