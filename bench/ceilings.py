"""What this machine can do at its best, measured in the same run as the rows that are held against it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from jindo_core.tune import elapsed


class Ceilings:
    """Bandwidths in GB/s and the rate of plain matrix products in TFLOP/s; each measured when first asked for.

    Args:
        device: what is measured. dtype: of the products.
        quick: small data, for the tests of this folder: its figures mean nothing.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> None:
        self.device, self.dtype = device, dtype
        # Well beyond any cache: 1 GiB on a GPU, 256 MiB on a CPU.
        self.bytes = 1 << 20 if quick else 1 << 30 if device.type == "cuda" else 1 << 28
        self.width = 128 if quick else 8192 if device.type == "cuda" else 2048
        self.values: dict[str, float] = {}

    def of(self, key: str) -> float:
        """The ceiling "copy", "read" or "gemm M=512"."""
        if key not in self.values:
            self.values[key] = self._measure(key)
        return self.values[key]

    def again(self) -> dict[str, dict[str, float]]:
        """Each that was used, as measured first and now: the drift of the machine during the run."""
        return {key: {"first": value, "again": self._measure(key)} for key, value in self.values.items()}

    @staticmethod
    def key(limit: str, rows: int) -> str:
        return f"gemm M={rows}" if limit == "gemm" else limit

    def _measure(self, key: str) -> float:
        kind, _, rows = key.partition(" M=")
        if kind == "gemm":
            return self._gemm(int(rows))
        return self._copy() if kind == "copy" else self._read()

    def _copy(self) -> float:
        """Bytes read and written, a second."""
        source = torch.zeros(self.bytes // 4, device=self.device)
        target = torch.empty_like(source)
        return 2 * self.bytes / self._best(lambda: target.copy_(source)) / 1e9

    def _read(self) -> float:
        source = torch.zeros(self.bytes // 4, device=self.device)
        return self.bytes / self._best(source.sum) / 1e9

    def _gemm(self, rows: int) -> float:
        """[M, n] times [n, n]; few rows are better off in fewer, larger products, so n is large."""
        n = self.width
        x = torch.randn(rows, n, device=self.device, dtype=self.dtype)
        w = torch.randn(n, n, device=self.device, dtype=self.dtype)
        out = torch.empty(rows, n, device=self.device, dtype=self.dtype)
        return 2 * rows * n * n / self._best(lambda: torch.mm(x, w.t(), out=out)) / 1e12

    def _best(self, call: Callable[[], object]) -> float:
        """The shortest of nine: a ceiling is what the machine can do when nothing else disturbs it."""
        call()
        call()
        return min(elapsed(call, self.device) for _ in range(9))
