"""`pytest bench/`: options, the refusal to time what is wrong, and the report."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # `pytest bench/` does not put the working directory there, `python -m pytest` does
    sys.path.insert(0, str(ROOT))

from bench import report  # noqa: E402
from bench.cases import Setup  # noqa: E402
from bench.ceilings import Ceilings  # noqa: E402
from bench.shapes import OPERATOR_SETS, STEP_SETS, named  # noqa: E402
from bench.timing import Pair  # noqa: E402
from jindo_core.loader import pick_device, pick_dtype  # noqa: E402

# Whose tests speak for a whole step: its pieces' own.
TESTS = {
    "step": "tests/jindo_core/test_lora.py",
    "decoding": "tests/jindo_core/test_decoding.py",
    "paged_adamw": "tests/jindo_core/test_paged_adamw.py",
    "streaming": "tests/jindo_core/test_streaming.py",
    "integrations": "tests/jindo_core/integrations/test_peft.py",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("jindo-core bench")
    group.addoption(
        "--shapes", default=None, metavar="NAMES",
        help="small, all, or of 110m,1b,7b,8b,13b,70b [small on a CPU, 7b,8b on a GPU]",
    )  # fmt: skip
    group.addoption("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N [auto]")
    group.addoption("--seconds", default=1.0, type=float, metavar="X", help="of timing a row, about [1]")
    group.addoption("--results", default=str(report.RESULTS), metavar="DIR", help="where the JSON goes")


def pytest_configure(config: pytest.Config) -> None:
    # Our table says the same and more than pytest-benchmark's.
    config.option.benchmark_quiet = True
    config.stash[ROWS] = []


ROWS = pytest.StashKey[list]()
CEILINGS = pytest.StashKey[Ceilings]()


@functools.cache
def _device(config: pytest.Config) -> torch.device:
    return pick_device(config.getoption("--device"))


def _shapes(config: pytest.Config, sets: dict[str, list[str]]) -> list:
    asked = config.getoption("--shapes") or ("7b,8b" if _device(config).type == "cuda" else "small")
    return named(asked, sets)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`shape` and `matrix` for the operators, `model` for the whole steps, by --shapes."""
    try:
        if "shape" in metafunc.fixturenames:
            metafunc.parametrize("shape", _shapes(metafunc.config, OPERATOR_SETS), ids=lambda shape: shape.name)
        if "model" in metafunc.fixturenames:
            metafunc.parametrize("model", _shapes(metafunc.config, STEP_SETS), ids=lambda shape: shape.name)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole steps first: unsloth, a peer of the dequantize, patches transformers when it is imported."""
    items.sort(key=lambda item: "_step" not in item.path.name and item.path.stem != "test_integrations")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def setup(request) -> Setup:
    device = _device(request.config)
    return Setup(device, pick_dtype("auto", device))


@pytest.fixture(scope="session")
def ceilings(request, setup) -> Ceilings:
    request.config.stash[CEILINGS] = Ceilings(setup.device, setup.dtype)
    return request.config.stash[CEILINGS]


@functools.cache
def fault(operator: str) -> str | None:
    """What is wrong with an operator: the last lines of its tests, run once a session in a process of their own."""
    tests = TESTS.get(operator, f"tests/kernels/test_{operator}.py")
    if not (ROOT / tests).exists():
        return f"{tests} is not there"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else "\n".join((done.stdout + done.stderr).splitlines()[-15:])


@pytest.fixture
def measure(request, benchmark, setup, ceilings):
    """measure(make, operator): time the case that `make()` gives, if the operator's tests pass; returns its row."""

    def run(make, operator):
        wrong = fault(operator)
        if wrong is not None:
            pytest.fail(f"{operator} is not timed, its tests fail:\n{wrong}", pytrace=False)
        pair = Pair(make(), setup.device, request.config.getoption("--seconds"))
        # pytest-benchmark times ours; before each of its rounds the peers run, so that both share the noise.
        benchmark.pedantic(pair.ours, setup=pair.peers, rounds=pair.rounds)
        row = pair.row(ceilings)
        benchmark.extra_info |= {"rate": row["rate"], "unit": row["unit"], "share": row["share"], **row["ratios"]}
        request.config.stash[ROWS].append(row)
        return row

    return run


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    device, drift = _device(config), config.stash[CEILINGS].again()
    report.settle(rows, drift)
    facts = report.facts(device)
    path = report.write(Path(config.getoption("--results")), facts | {"ceilings": drift, "rows": rows})
    terminalreporter.write_line("")
    terminalreporter.write(report.show(rows, drift, f"{facts['machine']}, torch {torch.__version__}"))
    terminalreporter.write_line(f"\nwritten to {path}")
