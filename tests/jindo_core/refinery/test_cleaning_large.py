"""A million rows on two processes: in bounded memory, within minutes, every planted piece of dirt accounted for."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time

import pytest

ROWS = 1_000_000
WORDS = ["오늘", "날씨가", "좋아서", "산책을", "했습니다", "모델은", "자료를", "배우고", "결과를", "방법으로"]
JOB = """
import json, resource, sys
from jindo_core.cli.main import main
if __name__ == "__main__":
    code = main(sys.argv[1:])
    peaks = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({"code": code, "parent": peaks[0], "largest worker": peaks[1]}), file=sys.stderr)
"""


def generate(path):
    """Writes the rows, and returns how many of each kind of dirt are among them."""
    draw, clean = random.Random(1), {}
    planted = dict.fromkeys(("line_ends", "zero_width", "empty_answers", "exact_duplicates"), 0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(ROWS):
            row = {"id": number, "instruction": f"{' '.join(draw.choices(WORDS, k=8))} {number}", "input": ""}
            row["output"] = " ".join(draw.choices(WORDS, k=40))
            kind = draw.randrange(40)
            if kind == 0:
                row["output"] = row["output"].replace(" ", "\r\n", 1)
                planted["line_ends"] += 1
            elif kind == 1:
                row["output"] += "\u200b."
                planted["zero_width"] += 1
            elif kind == 2:
                row["output"] = " "
                planted["empty_answers"] += 1
            elif kind == 3 and clean:
                row = {**clean, "id": number}
                planted["exact_duplicates"] += 1
            else:
                clean = row
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return planted


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["default", "korean"])
def test_a_million_rows(tmp_path, repo_root, recipe):
    planted = generate(tmp_path / "in.jsonl")
    (tmp_path / "job.py").write_text(JOB)
    argv = ["data", "clean", "--data_path", "in.jsonl", "--output_path", "out.jsonl", "--rejected_path", "gone.jsonl"]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "job.py", *argv, "--recipe", recipe, "--workers", "2", "--json"],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(repo_root)}, check=True,
    )  # fmt: skip
    minutes = (time.monotonic() - started) / 60
    peaks, report = json.loads(done.stderr.splitlines()[-1]), json.loads(done.stdout)
    print(f"\n{minutes:.1f} minutes; parent {peaks['parent']:.0f} MB, largest worker {peaks['largest worker']:.0f} MB")
    steps = {step["step"]: step for step in report["steps"]}
    assert peaks["code"] == 0
    assert steps["line_ends"]["changed"] == planted["line_ends"]
    assert steps["zero_width"]["changed"] == planted["zero_width"]
    assert steps["empty_answers"]["rejected"] == planted["empty_answers"]
    if recipe == "default":
        assert steps["exact_duplicates"]["rejected"] == planted["exact_duplicates"]
    else:  # other steps see those rows as well
        assert report["rejected"] >= planted["empty_answers"] + planted["exact_duplicates"]
    with (tmp_path / "out.jsonl").open() as out, (tmp_path / "gone.jsonl").open() as rejected:
        assert sum(1 for _ in out) == report["out"] == ROWS - report["rejected"]
        assert sum(1 for _ in rejected) == report["rejected"]
    # The source alone is some 600 MB. Of near duplicates the parent looks at mapped signatures, 512 bytes a row.
    assert peaks["parent"] < (250 if recipe == "default" else 1000)
    assert peaks["largest worker"] < (150 if recipe == "default" else 300)
    assert minutes < 15
