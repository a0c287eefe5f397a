"""A host that runs out of memory: a run gives way before the kernel kills it.

Between two steps, once a second at most, a few files of /proc and of the control groups are read. Where one of them
leaves less than its margin, one thing gives way, none of which changes a bit of the result: page stores in RAM move to
files; on a CPU, whose RAM is the device itself, AdamW's moments and layers' weights do. When nothing is left that
could, the run is to save a checkpoint and to end with a code that means "try again".

Page cache counts as free, also what was used of late: the kernel takes it back before it kills. PSI is not looked at:
it is a machine's or a group's, whoever makes it wait, and rises when others start.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from jindo_core.causal_lm import CausalLM
from jindo_core.errors import InputError
from jindo_core.head import StreamedHead
from jindo_core.memory import Relief, give_back_freed
from jindo_core.paged_adamw import PagedAdamW
from jindo_core.pages import Limit, lies_in_ram, limits
from jindo_core.parallel import ALONE, Ranks

LEAST = 256 << 20
"""Bytes of a limit that are kept free, …"""

SHARE = 0.03
"""… or this share of it where that is more, …"""

MOST, MOST_SHARE = 2 << 30, 0.1
"""… but never more bytes or a larger share than these: a large machine has enough then, and a small container may be
filled."""

INTERVAL = 1.0
"""Seconds between two looks, while all is well."""

SETTLE = 3.0
"""Seconds after giving way before more does, for control groups count with a delay of two. Where less than half of the
margin is left all goes at once."""

TRY_AGAIN = 75
"""The exit code of a run that stops for want of memory: EX_TEMPFAIL of sysexits.h, "try again later"."""

_WELL, _SHORT, _URGENT = range(3)

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")

EXACT = ("moments", "layers")
"""What of Relief's measures frees RAM beside a CPU and changes no bit. The others make a step's peak smaller, which is
over when this is asked."""


def margin(limit: Limit) -> int:
    """Bytes of a limit that should be free between two steps."""
    return int(min(max(LEAST, SHARE * limit.most), MOST, MOST_SHARE * limit.most))


def shortest(proc: Path, cgroups: Path, unread: Callable[[str], None] | None = None) -> Limit | None:
    """The limit that is over its margin by most; None where none is. unread: is told why a limit can't be read."""
    found = [(limit.left + limit.busy - margin(limit), limit) for limit in limits(proc, cgroups, unread)]
    spare, worst = min(found, default=(0, None))
    return worst if spare < 0 else None


class HostWatch:
    """Looks at the host's memory between steps, and gives way where it runs short.

    Args:
        relief: of the same run; what it takes goes through checkpoints.
        folder: for what leaves RAM. One that lies in RAM itself serves nothing, and is refused when it is needed.
        ranks: the processes of the run, which give way and stop together.
        clock: in seconds.
    """

    def __init__(
        self, model: CausalLM, optimizer: torch.optim.Optimizer, relief: Relief, folder: str | Path,
        ranks: Ranks = ALONE, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._model, self._optimizer, self._relief, self._ranks = model, optimizer, relief, ranks
        self._folder, self._clock = folder, clock
        self._next = self._settled = clock()
        self._refused: list[str] = []
        self._in_vain = False  # nothing was left to give at the last look
        self._unread: set[str] = set()

    @property
    def due(self) -> bool:
        """Whether this rank's last look was a while ago."""
        return self._clock() >= self._next

    def look(self, step: int, said: Callable[[str], None], due: bool | None = None) -> str | None:
        """* See what is left behind step `step`, and give way where that is too little.

        Args:
            said: is told what gave way, and once of each limit that can't be read.
            due: whether it is, for any rank; left out: the ranks ask each other.
        Returns:
            None where the run goes on; else why it can't.
        """
        if not (self._ranks.worst(int(self.due)) if due is None else due):
            return None
        self._next = self._clock() + INTERVAL

        def unread(why: str) -> None:
            if why not in self._unread:
                self._unread.add(why)
                said(f"{why}: that limit of memory is not watched")

        need, short = self._need(unread)
        waits = self._ranks.worst(int(self._clock() < self._settled))
        self._in_vain = self._in_vain and need > _WELL
        if need == _WELL or (need == _SHORT and waits):
            return None
        self._give_back()
        need, short = self._need(unread)
        stuck = False
        while need and not stuck:
            done, stuck = self._give_way()
            if done is not None:
                said(f"step {step}: {_said(short)}: {done}")
            self._give_back()
            need, short = self._need(unread)
            if need < _URGENT:
                break
        self._settled = self._clock() + SETTLE
        if need == _WELL or not stuck:
            return None
        if need == _SHORT and not self._in_vain:
            self._in_vain = True  # somebody else's need may be over soon
            return None
        refused = "".join(f"; {why}" for why in self._refused)
        return f"{_said(short)}, and nothing is left that could give way{refused}"

    def _need(self, unread: Callable[[str], None]) -> tuple[int, Limit | None]:
        """* How short of memory the rank is that is worst off, and by which limit this one is."""
        short = shortest(PROC, CGROUPS, unread)
        urgent = short is not None and short.left + short.busy < margin(short) // 2
        return self._ranks.worst(_WELL if short is None else _URGENT if urgent else _SHORT), short

    def _give_back(self) -> None:
        """What the allocators keep of freed memory."""
        give_back_freed()
        if self._model.device.type == "cuda":
            # torch's pool of pinned RAM; before 2.13 it was emptied under a private name.
            empty = getattr(torch.accelerator, "empty_host_cache", None) or torch._C._host_emptyCache
            empty()

    def _give_way(self) -> tuple[str | None, bool]:
        """* Free something, and say what this rank freed; and whether any rank has nothing left that could."""
        done = self._move_a_store()
        if self._ranks.worst(int(done is not None)):
            return done, False
        # What goes now goes through checkpoints, and is all ranks'.
        done = self._evict()
        first, *others = self._ranks.gather(self._relief.state())
        return done, bool(self._ranks.worst(int(done is None or any(state != first for state in others))))

    def _move_a_store(self) -> str | None:
        if lies_in_ram(self._folder):
            self._refuse(f"{self._folder} lies in RAM itself: give --offload_folder, or TMPDIR, a folder on a disk")
            return None
        for what, move in self._stores():
            try:
                if moved := move(self._folder):
                    self._relief.place = str(self._folder)
                    return f"{moved / 1e6:,.0f} MB of {what} move from RAM to a file"
            except InputError as error:
                self._refuse(str(error))
        return None

    def _evict(self) -> str | None:
        """What lies on a CPU, which is the host: into a file."""
        if self._model.device.type != "cpu" or lies_in_ram(self._folder):
            return None
        self._relief.place = str(self._folder)
        return self._relief.give_way(among=EXACT[:1] if self._ranks.sharded else EXACT)

    def _stores(self) -> list[tuple[str, Callable[[str | Path], int]]]:
        """What may lie in pages; those first that a step needs least often."""
        stack, head, optimizer = self._model.stack, self._model.lm_head, self._optimizer
        found: list[tuple[str, Callable[[str | Path], int]]] = []
        if isinstance(optimizer, PagedAdamW):
            found.append(("AdamW's moments", optimizer.move_to))
        if isinstance(head, StreamedHead):
            found.append(("the head", head.move_to))
        if stack.checkpoint_offload is not None:
            found.append(("layers' inputs", stack.checkpoint_offload.move_to))
        if stack.stream is not None:
            found.append(("layers' weights", stack.stream.move_to))
        return found

    def _refuse(self, why: str) -> None:
        if why not in self._refused:
            self._refused.append(why)


def _said(short: Limit | None) -> str:
    if short is None:
        return "another process of the run is short of memory"
    left, most, kept = (size / 1e6 for size in (short.left + short.busy, short.most, margin(short)))
    return f"{left:,.0f} of {most:,.0f} MB of memory are left, less than the {kept:,.0f} to be kept"
