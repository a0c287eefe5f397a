"""`make gpu`: everything that needs a GPU, in one run of less than 8 minutes, without a network and without pytest.

    python bench/gpu.py [--device cuda] [--shapes 7b,8b] [--sections correctness,operators,steps,memory]
    python bench/gpu.py --device cpu --quick        # the same code on tiny shapes; its figures mean nothing

The repository may be a plain folder that was never installed. Each section runs in a process of its own: one that
hangs is ended at its deadline, and one whose CUDA context a bad kernel has spoiled starts again behind that kernel.
Results: JSON in $OUT, else bench/results/, and a table. Exit code 1 where an operator is wrong or was not checked.
JINDO_BITSANDBYTES may name a folder that holds bitsandbytes.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# Section -> seconds since the start at which it ends at the latest; what one leaves over the next may use.
ENDS = {"correctness": 160.0, "operators": 300.0, "steps": 415.0, "memory": 440.0, "caps": 470.0}
GRACE = 8.0
"""Seconds beyond its deadline in which a section may finish the piece it is at."""

SPOILED = 3
"""Exit code of a section whose CUDA context can't be used any more."""

Piece = tuple[str, Callable[[], dict[str, Any]]]


def prepare() -> None:
    """Make the folder importable: the two links that a copy may have lost, and the root on the path."""
    for name in ("kernels", "cli"):
        link = ROOT / "jindo_core" / name
        if link.is_dir():
            continue
        if link.is_symlink() or link.is_file():  # broken, or turned into a text file by the copy
            link.unlink()
        link.symlink_to(Path("..") / name, target_is_directory=True)
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))


# --- the pieces of each section: (name, what to run), run in the section's process ------------------------


def correctness_pieces(given: argparse.Namespace) -> Iterator[Piece]:
    from bench.correctness import CHECKS

    device = _device(given)

    def run(name: str) -> dict[str, Any]:
        findings = list(CHECKS[name](device, given.quick))
        failed = [f"{f.what}: error {f.error:.3g}, allowed {f.allowed:.3g}" for f in findings if not f.passed]
        worst = max((f.error / f.allowed for f in findings if f.allowed), default=0.0)
        return {"operator": name, "checks": len(findings), "failed": failed, "worst_of_allowed": worst}

    for name in CHECKS:
        yield name, functools.partial(run, name)


def operator_pieces(given: argparse.Namespace) -> Iterator[Piece]:
    from bench import cases, timing
    from bench.ceilings import Ceilings

    setup = cases.Setup(_device(given), _dtype(given), quick=given.quick)
    ceilings = Ceilings(setup.device, setup.dtype, quick=given.quick)
    refused = set(given.wrong)

    def run(make: Callable[[], cases.Case]) -> dict[str, Any]:
        case = make()
        if case.operator in refused:
            return {"refused": f"{case.name} {case.shape}: {case.operator} is wrong on this device"}
        return {"row": timing.measure(case, setup.device, ceilings, given.seconds)}

    for shape in _shapes(given):
        rows = (16, 32) if given.quick else (512, 2048)
        for i, make in enumerate(cases.operator_cases(setup, shape, rows)):
            yield f"{shape.name} {i}", functools.partial(run, make)
    yield "ceilings", lambda: {"ceilings": ceilings.again()}


def step_pieces(given: argparse.Namespace) -> Iterator[Piece]:
    import torch

    from bench import steps, timing
    from bench.ceilings import Ceilings

    device, dtype = _device(given), _dtype(given)
    ceilings = Ceilings(device, dtype, quick=given.quick)
    roomy = device.type != "cuda" or torch.cuda.get_device_properties(device).total_memory > 40e9
    tokens = 32 if given.quick else 2048 if roomy else 512

    def run(make: Callable[[], timing.Case]) -> dict[str, Any]:
        return {"row": timing.measure(make(), device, ceilings, given.seconds * 8)}

    for shape in _shapes(given):
        # Decoding first: it is short. On a small GPU only checkpointed training, beside the peers' default.
        make = functools.partial(steps.decoding_case, shape, dtype, device, 16 if given.quick else 512)
        yield f"decoding {shape.name}", functools.partial(run, make)
        for checkpointing in (True, False) if roomy else (True,):
            make = functools.partial(
                steps.training_case, shape, dtype, device, tokens, checkpointing=checkpointing, only_first=not roomy
            )
            kind = "checkpointed" if checkpointing else "plain"
            yield f"training {shape.name} {kind}", functools.partial(run, make)
    yield "ceilings", lambda: {"ceilings": ceilings.again()}


def memory_pieces(given: argparse.Namespace) -> Iterator[Piece]:
    from bench import steps

    device, tokens = _device(given), 32 if given.quick else 512
    sides = [steps.OURS, steps.OURS_CHECKPOINTED] + ([steps.PEER] if steps.peers_here(device) else [])
    jobs = [("train", side) for side in sides] + [("decode", side) for side in sides if side != steps.OURS_CHECKPOINTED]

    def run(what: str, who: str, shape: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "bench.steps", what, who, shape, "--tokens", str(tokens)]
        command += ["--device", str(device), "--dtype", str(_dtype(given)).removeprefix("torch.")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
        return {"memory": json.loads(done.stdout.splitlines()[-1]) | {"tokens": tokens}}

    for shape in _shapes(given)[: 1 if given.quick else None]:
        for what, who in jobs[:: 2 if given.quick else 1]:
            yield f"{what} {who} {shape.name}", functools.partial(run, what, who, shape.name)


def cap_pieces(given: argparse.Namespace) -> Iterator[Piece]:
    """Whole models under hard caps: of the shapes asked for, or with --shapes all every goal."""
    from bench.caps import GOALS

    def run(shape: str, budget: int) -> dict[str, Any]:
        command = [sys.executable, "-m", "bench.caps", shape, str(budget), "--device", given.device]
        command += ["--dtype", str(_dtype(given)).removeprefix("torch."), "--tokens", "32" if given.quick else "512"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
        return {"cap": json.loads(done.stdout.splitlines()[-1])}

    named = {shape.name for shape in _shapes(given)}
    goals = [("tiny", 600)] if given.quick else [g for g in GOALS if given.shapes == "all" or g[0] in named]
    for shape, budget in goals:
        yield f"{shape} in {budget} MB", functools.partial(run, shape, budget)


SECTIONS: dict[str, Callable[[argparse.Namespace], Iterator[Piece]]] = {
    "correctness": correctness_pieces,
    "operators": operator_pieces,
    "steps": step_pieces,
    "memory": memory_pieces,
    "caps": cap_pieces,
}


def _device(given: argparse.Namespace) -> Any:
    import torch

    return torch.device(given.device)


def _dtype(given: argparse.Namespace) -> Any:
    import torch

    from jindo_core.loader import pick_dtype

    # GPUs before sm_80 compute in fp16 only; "auto" would take fp32 there.
    chosen = pick_dtype("auto", _device(given))
    return torch.float16 if given.device != "cpu" and chosen == torch.float32 else chosen


def _shapes(given: argparse.Namespace) -> list[Any]:
    from bench.shapes import STEP_SETS, named

    return named("tiny" if given.quick else given.shapes, STEP_SETS)


def run_section(given: argparse.Namespace) -> int:
    """Runs the pieces of one section that are not in --skip, and writes each one's outcome as a line of JSON."""
    import torch

    from bench.report import facts

    torch.manual_seed(0)
    end = time.monotonic() + given.left
    with open(given.record, "a", encoding="utf-8", buffering=1) as record:

        def write(**line: Any) -> None:
            record.write(json.dumps(line) + "\n")

        write(facts=facts(_device(given)))
        for name, run in SECTIONS[given.section](given):
            if name in given.skip:
                continue
            if time.monotonic() > end:
                write(piece=name, late=True)
                continue
            write(piece=name, start=True)
            started = time.monotonic()
            try:
                found = run()
            except Exception as error:  # noqa: BLE001 - reported, and no reason to leave out the rest
                write(piece=name, error=_one_line(error), traceback=traceback.format_exc())
                if "CUDA error" in str(error) or "device-side assert" in str(error):
                    return SPOILED
            else:
                write(piece=name, seconds=round(time.monotonic() - started, 2), **found)
            if given.device != "cpu":
                torch.cuda.empty_cache()
    return 0


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


# --- the run: a process a section -----------------------------------------------------------------------


def supervise(section: str, given: argparse.Namespace, end: float, wrong: Sequence[str]) -> list[dict[str, Any]]:
    """The lines of a section, run until it is through or its time is over."""
    lines: list[dict[str, Any]] = []
    while True:
        left = end - time.monotonic()
        done = sorted({line["piece"] for line in lines if "piece" in line})
        if left <= 0:
            return [*lines, {"piece": section, "error": "no time left"}]
        with tempfile.TemporaryDirectory() as folder:
            record = Path(folder) / "lines"
            command = [
                sys.executable, str(Path(__file__).resolve()), "--section", section, "--record", str(record),
                "--left", f"{left:.1f}", "--device", given.device, "--shapes", given.shapes,
                "--seconds", str(given.seconds), "--skip", *done, "--wrong", *wrong,
            ]  # fmt: skip
            command += ["--quick"] if given.quick else []
            with subprocess.Popen(command, stdout=sys.stderr, cwd=ROOT) as child:
                try:
                    code: int | str = child.wait(left + GRACE)
                except subprocess.TimeoutExpired:
                    child.kill()
                    code = "ended at its deadline"
            text = record.read_text(encoding="utf-8") if record.exists() else ""
        new = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        open_pieces = {line["piece"] for line in new if line.get("start")}
        closed = [line for line in new if "piece" in line and not line.get("start")]
        open_pieces -= {line["piece"] for line in closed}
        lines += [line for line in new if "facts" in line] + closed
        lines += [{"piece": piece, "error": f"the process died: {code}"} for piece in open_pieces]
        if code == 0 or isinstance(code, str):
            return lines
        if not closed and not open_pieces:  # not even its first piece: trying again would change nothing
            return [*lines, {"piece": section, "error": f"the section could not start (exit code {code})"}]


def _verdict(checks: list[dict[str, Any]]) -> bool:
    return bool(checks) and all("checks" in line and not line["failed"] for line in checks)


def gather(lines: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What all sections found, as it is written."""
    from bench.report import settle

    for own in lines.values():
        measured = {key: value for line in own for key, value in line.get("ceilings", {}).items()}
        settle([line["row"] for line in own if "row" in line], measured)
    flat = [(section, line) for section, own in lines.items() for line in own]
    facts = next((line["facts"] for _, line in flat if "facts" in line), {"machine": "unknown", "measured": False})
    checks = [line for section, line in flat if section == "correctness" and "piece" in line]
    kept = ("piece", "error", "traceback", "late", "refused")
    errors = [
        {"section": section, **{key: line[key] for key in kept if key in line}}
        for section, line in flat
        if line.get("error") or line.get("late") or line.get("refused")
    ]  # fmt: skip
    ceilings = {f"{section}: {key}": value for section, line in flat for key, value in line.get("ceilings", {}).items()}
    return facts | {
        "correct": _verdict(checks) if "correctness" in lines else None,  # None: it was not asked for
        "correctness": [line for line in checks if "checks" in line],
        "errors": errors,
        "ceilings": ceilings,
        "rows": [line["row"] for _, line in flat if "row" in line],
        "memory": [line["memory"] for _, line in flat if "memory" in line],
        "caps": [line["cap"] for _, line in flat if "cap" in line],
    }


def say(content: dict[str, Any], path: Path, seconds: float) -> None:
    """The short account of a run."""
    from bench.report import show

    print(show(content["rows"], content["ceilings"], f"{content['machine']}, torch {content.get('torch', '?')}"))
    for line in content["memory"]:
        print(f"peak memory, {line['what']} {line['shape']}, {line['tokens']} tokens, {line['who']}: "
              f"{line['peak_mib']:,} MiB, {line['tokens_per_s']:.0f} tok/s")  # fmt: skip
    for line in content["caps"]:
        held, planned = line["peak_bytes"] / 1e6, line["planned_bytes"] / 1e6
        print(f"cap of {line['budget_MB']:,} MB, {line['shape']}, {line['tokens']} tokens: {held:,.0f} MB held, "
              f"{planned:,.0f} planned, {line['tokens_per_s']:.0f} tok/s, stalled {line['stalled_share']:.0%}, "
              f"{len(line['gave_way'])} times out of memory")  # fmt: skip
    for line in content["correctness"]:
        verdict = "FAILED" if line["failed"] else f"passed, worst {line['worst_of_allowed']:.0%} of what is allowed"
        print(f"correctness, {line['operator']}: {line['checks']} checks, {verdict}")
        for failed in line["failed"][:5]:
            print(f"    {failed}")
    for line in content["errors"]:
        why = line.get("error") or line.get("refused") or "no time left"
        print(f"not done, {line['section']} {line['piece']}: {why}")
    verdict = "every operator is correct" if content["correct"] else "CORRECTNESS FAILED"
    print(f"{verdict if content['correctness'] else 'correctness was not checked'}; {seconds:.0f} s; {path}")


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/gpu.py", allow_abbrev=False)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu [cuda]")
    parser.add_argument("--shapes", default="7b,8b", help="of 110m,1b,7b,8b,13b,70b [7b,8b]")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which, with commas between [all]")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to try the script itself")
    parser.add_argument("--seconds", type=float, default=0.4, help="of timing a row, about [0.4]")
    for name in ("section", "record"):  # the rest is between the run and its sections
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--left", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--skip", nargs="*", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--wrong", nargs="*", default=[], help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if unknown := [name for name in given.sections.split(",") if name not in SECTIONS]:
        parser.error(f"--sections: got {unknown[0]!r}, expected {', '.join(SECTIONS)}")
    return given


def main(argv: Sequence[str]) -> int:
    started = time.monotonic()
    given = arguments(argv)
    prepare()
    if given.section:
        return run_section(given)
    if given.quick:
        given.seconds = min(given.seconds, 0.02)
    import torch

    if given.device != "cpu" and not torch.cuda.is_available():
        print("error: got no CUDA device, expected one: --device cpu --quick tries the script", file=sys.stderr)
        return 2
    from bench import report

    lines: dict[str, list[dict[str, Any]]] = {}
    wrong: list[str] = []
    for section in given.sections.split(","):
        print(f"{time.monotonic() - started:4.0f} s: {section}", file=sys.stderr, flush=True)
        lines[section] = supervise(section, given, started + ENDS[section], wrong)
        if section == "correctness":
            # What failed, or could not be checked, is not timed.
            wrong = [line["piece"] for line in lines[section] if "piece" in line and line.get("failed", True)]
    content = gather(lines) | {"quick": given.quick, "seconds": round(time.monotonic() - started, 1)}
    content["measured"] = content.get("measured", False) and not given.quick
    path = report.write(Path(os.environ.get("OUT") or report.RESULTS), content)
    say(content, path, time.monotonic() - started)
    return 0 if content["correct"] or "correctness" not in lines else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
