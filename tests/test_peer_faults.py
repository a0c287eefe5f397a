"""What bench/peer_faults.py says of the peers: its disk really breaks, and docs/reliability.md holds its results."""

from __future__ import annotations

import errno
import importlib
import json
import re
import subprocess
import sys

import pytest

WRITER = """
import ctypes, os, sys
library, folder = ctypes.CDLL(None), sys.argv[1]
library.peer_disk_arm(f"{folder}/".encode(), int(sys.argv[2]), ctypes.c_long(int(sys.argv[3])))
file = os.open(f"{folder}/a", os.O_CREAT | os.O_WRONLY)
try:
    os.write(file, b"12345678")
    os.fsync(file)
except OSError as error:
    sys.exit(error.errno)
os.rename(f"{folder}/a", f"{folder}/b")
print(library.peer_disk_count(), library.peer_disk_syncs())
"""
OPEN, WRITE, SYNC, RENAME = range(4)


@pytest.fixture
def peer_faults(repo_root, monkeypatch):
    monkeypatch.syspath_prepend(str(repo_root))
    return importlib.import_module("bench.peer_faults")


@pytest.fixture
def results(peer_faults):
    folder = peer_faults.BENCH / "results"
    return {name: json.loads((folder / f"peer-faults-{name}.json").read_text()) for name in peer_faults.PEERS}


@pytest.fixture(scope="session")
def library(repo_root, tmp_path_factory):
    path = tmp_path_factory.mktemp("disk") / "peer_disk.so"
    source = repo_root / "bench" / "peer_disk.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", path, source, "-ldl"], check=True)
    return path


@pytest.fixture
def written(library, tmp_path):
    """written(mode, boundary) -> how a process ended that writes, and what it left."""

    def write(mode, boundary):
        folder = tmp_path / "disk"
        folder.mkdir()
        command = [sys.executable, "-c", WRITER, str(folder), str(mode), str(boundary)]
        done = subprocess.run(command, env={"LD_PRELOAD": str(library)}, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.split(), {path.name: path.read_bytes() for path in folder.iterdir()}

    return write


@pytest.mark.parametrize(
    ("boundary", "left"),
    [(OPEN, {}), (WRITE, {"a": b"1234"}), (SYNC, {"a": b"12345678"}), (RENAME, {"a": b"12345678"})],
)
def test_a_process_is_killed_at_the_boundary(boundary, left, written, peer_faults):
    assert written(peer_faults.KILL, boundary) == (-9, [], left)


def test_a_disk_is_full_from_the_boundary_on(written, peer_faults):
    assert written(peer_faults.FULL, WRITE) == (errno.ENOSPC, [], {"a": b""})


def test_without_a_fault_calls_are_counted(written):
    assert written(0, -1) == (0, ["4", "1"], {"b": b"12345678"})


def test_the_page_holds_the_results(peer_faults, results):
    """`python -m bench.peer_faults --docs` puts them there, also after a row was added."""
    text = peer_faults.DOCS.read_text(encoding="utf-8")
    assert peer_faults.columns(text, results) == text
    rows = [line for line in text.partition("## Faults")[2].splitlines() if line.startswith("|")]
    assert {len(row.split("|")) for row in rows} == {8}


def test_the_faults_are_the_page_s_rows(peer_faults, results):
    rows = set(re.findall(r"`(test_\w+)`", peer_faults.DOCS.read_text(encoding="utf-8").partition("## Faults")[2]))
    for result in results.values():
        assert result["measured"] is True
        assert set(result["faults"]) | set(peer_faults.NOT_TRIED) <= rows
        assert not set(result["faults"]) & set(peer_faults.NOT_TRIED)


def test_a_row_of_four_cells_gets_its_peers_and_says_what_was_not_tried(peer_faults, results):
    head = "| fault | what happens | test in tests/faults |\n|---|---|---|\n"
    row = "| x | y | `test_new` |\n\nrest"
    last = peer_faults.columns(f"before\n{head}{row}", results).splitlines()[3]
    assert last == "| x | y | not tried | not tried | not tried | `test_new` |"


class Stopped:
    """A bench whose peer saves after steps 3 and 6; intact: what resuming undamaged ends with."""

    def __init__(self, module):
        self.peer = type("Peer", (), {"name": "transformers"})
        self.whole = module.Ended(0, "", {"digest": "whole", "start": 0}, [])
        self.intact = "intact"


@pytest.mark.parametrize(
    ("code", "start", "digest", "said"),
    [
        (0, 6, "whole", "from the newest"),
        (0, 6, "intact", "from the newest"),
        (0, 6, "else", "taken, with another result"),
        (0, 3, "else", "from the one before"),
        (0, 0, "whole", "afresh"),
        (1, 6, "whole", "error: SafetensorError"),
        (None, 6, "whole", "hangs"),
    ],
)
def test_what_became_of_a_resumed_run(code, start, digest, said, peer_faults):
    words = "Traceback\n  File\nsafetensors.SafetensorError: header\n"
    ended = peer_faults.Ended(code, words, {"start": start, "digest": digest}, [])
    assert peer_faults.Bench.became(Stopped(peer_faults), ended) == said
