"""docs/reliability.md names a test for every fault, and each of them is there."""

from __future__ import annotations

import ast
import re


def test_every_test_that_is_named_is_there_and_every_flag_is_described(repo_root):
    text = (repo_root / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    there = {
        node.name
        for path in (repo_root / "tests" / "faults").glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert len(named) > 20
    assert named <= there
    rows = [line for line in text.partition("## Faults")[2].splitlines() if line.startswith("|")][2:]
    assert all(re.search(r"`test_\w+`", row) for row in rows)
