"""What other trainers do under the faults of docs/reliability.md, by doing them: on the CPU, with a tiny LLaMA.

python -m bench.peer_faults --base_model FOLDER [--peers transformers,lightning,torchtune] [--python PYTHON]
python -m bench.peer_faults --docs RESULT.json      the peers' columns of docs/reliability.md from a result

FOLDER is a small LLaMA in Hugging Face's layout (stories260K). A peer that PYTHON can't import is named and left out.
Runs are forked from one process a peer (peer_trainers.py), whose disk is broken from below (peer_disk.c); what needs
signals or several processes starts real ones. Needs a C compiler. Results go to bench/results/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench import peer_processes
from bench.peer_runs import BENCH, DIES, SAVES, Bench, Ended, Peer, disk, kinds, sampled

DOCS = BENCH.parent / "docs" / "reliability.md"
PEERS = {"transformers": "transformers' Trainer", "lightning": "Lightning", "torchtune": "torchtune"}
KILL, FULL = 1, 2  # peer_disk.c's modes
WEIGHTS = (".pt", ".pth", ".ckpt", ".safetensors")

NOT_TRIED = {
    "test_a_measurement_is_left_off_and_made_after_all": "not tried",
    "test_a_signal_on_a_full_disk_says_what_stands": "not tried",
    "test_what_gave_way_gives_way_again": "not tried: needs a GPU",
    "test_a_budget_is_planned_once": "no such setting",
}


def killed(bench: Bench) -> dict[str, str]:
    """kill -9 at boundaries of the second save, and of a whole run; what the same command does then."""
    peer, found = bench.peer, {}
    first, last = bench.boundaries(SAVES[peer.name][1])
    total = bench.whole.progress[-1]["boundaries"]
    for test, places in (
        ("test_a_save_that_is_killed_anywhere_leaves_a_whole_checkpoint", sampled(first, last, 8 if bench.few else 20)),
        ("test_runs_that_are_killed_end_as_the_one_that_was_not", sampled(0, total, 6 if bench.few else 12)),
    ):
        words, same = [], 0
        for place in places:
            job = peer.job(disk=(KILL, place))
            if (ended := peer.run(job)).code != -9:
                raise RuntimeError(f"{peer.name} was not killed at {place}: {ended.code}")
            ended = bench.resume(job)
            words.append(bench.became(ended))
            same += bench.same(ended)
        bench.detail[test] = dict(zip(places, words, strict=True))
        found[test] = f"{len(places)} kills; resumed: {kinds(words)}; the same bytes: {same}"
    synced = {row["step"]: row["syncs"] for row in bench.whole.progress}
    step = SAVES[peer.name][1]
    count = synced[step + 1] - synced[step]
    found["test_files_and_folders_are_synced_before_the_name_is_given"] = f"{count or 'no'} syncs in a save"
    return found


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0" * 64)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "cut": _cut, "longer": _lengthen, "empty": lambda path: os.truncate(path, 0), "missing": Path.unlink,
}  # fmt: skip


def damaged(bench: Bench) -> dict[str, str]:
    """Files of the newest checkpoint cut, lengthened, emptied, removed; then all checkpoints cut; then no moments."""
    peer, words, found = bench.peer, {}, {}
    for name in peer.files(bench.state):
        for damage, do in DAMAGE.items():
            job = peer.job(bench.state)
            do(disk(job) / name)
            words[f"{name} {damage}"] = bench.became(bench.resume(job))
    bench.detail["damage"] = words
    found["test_the_newest_that_is_whole_is_taken_and_others_are_named"] = f"{len(words)} damages: {_effects(words)}"
    job = peer.job(bench.state)
    for path in disk(job).rglob("*"):
        if path.suffix in WEIGHTS:
            _cut(path)
    found["test_when_all_are_damaged_nothing_starts_afresh"] = bench.became(bench.resume(job))
    return found | {"test_a_missing_optimizer_state_is_never_fresh": _without_moments(bench)}


def _effects(words: dict[str, str]) -> str:
    """What came of damages to the newest checkpoint: going on from it as if they were not is to have none."""
    return kinds(list(words.values())).replace("from the newest", "without effect")


def _without_moments(bench: Bench) -> str:
    import torch

    job = bench.peer.job(bench.state)
    if bench.peer.name == "transformers":
        (disk(job) / "out" / f"checkpoint-{SAVES['transformers'][1]}" / "optimizer.pt").unlink()
    else:
        lightning = bench.peer.name == "lightning"
        path = disk(job) / ("out/last.ckpt" if lightning else "out/recipe_state/recipe_state.pt")
        held = torch.load(path, weights_only=False)
        del held["optimizer_states" if lightning else "optimizer"]
        torch.save(held, path)
    ended = bench.resume(job)
    bench.detail["without moments"] = [ended.code, ended.report, ended.error]
    if ended.code != 0:
        return f"{ended.error}"
    fresh = ended.report["updates"] < bench.whole.report["updates"]
    return "resumes, with fresh moments" if fresh else "resumes with moments of unknown origin"


def flipped(bench: Bench) -> dict[str, str]:
    """One bit of the newest checkpoint turned over, at places drawn evenly from each of its files."""
    peer, chance, words = bench.peer, np.random.RandomState(0), {}
    names = peer.files(bench.state)
    each = (24 if bench.few else 100) // len(names)
    for name in names:
        for place in chance.choice((bench.state / name).stat().st_size * 8, each, replace=False).tolist():
            job = peer.job(bench.state)
            path = disk(job) / name
            data = bytearray(path.read_bytes())
            data[place // 8] ^= 1 << place % 8
            path.write_bytes(data)
            words[f"{name} bit {place}"] = bench.became(bench.resume(job))
            subprocess.run(["rm", "-r", str(disk(job))], check=True)
    bench.detail["flips"] = words
    return {"test_a_flipped_bit_anywhere_is_found": f"{len(words)} flips: {_effects(words)}"}


def full(bench: Bench) -> dict[str, str]:
    """No room from a boundary of the second save on; then room again, and the same command."""
    peer, words, codes = bench.peer, [], []
    for place in sampled(*bench.boundaries(SAVES[peer.name][1]), 6 if bench.few else 10):
        job = peer.job(disk=(FULL, place))
        ended = peer.run(job)
        codes.append("run goes on" if ended.code == 0 else "run dies")
        words.append(bench.became(bench.resume(job)))
    bench.detail["full"] = [codes, words]
    died = codes.count("run dies")
    text = f"the run dies {died} times of {len(codes)}; resumed with room: {kinds(words)}"
    return {"test_a_checkpoint_that_can_t_be_written_costs_no_step_and_no_older_one": text}


def numbers(bench: Bench) -> dict[str, str]:
    """A gradient that is not a number; other settings and rows than the checkpoint's; exactness."""
    peer, found = bench.peer, {}
    ended = peer.run(peer.job(nan_at=4))
    weights = "weights finite" if ended.report.get("finite") else "the weights are NaN from then on"
    found["test_the_batch_is_named_by_rows_and_file"] = (
        f"{weights}, run ends with code {ended.code}" if ended.report else f"ends: {ended.error}"
    )
    found["test_skipped_steps_are_counted_through_a_stop"] = "not tried: it skips no step"
    said = {}
    for name, value in {"batch_size": 2, "seed": 2, "learning_rate": 1e-3, "lora_r": 4}.items():
        ended = bench.resume(peer.job(bench.state), **{name: value})
        said[name] = ended.error if ended.code != 0 else _warned(ended, name) or "taken"
    bench.detail["settings"] = said
    found["test_each_fixed_setting_is_refused_by_name"] = "; ".join(f"{k}: {v}" for k, v in said.items())
    ended = bench.resume(peer.job(bench.state, rows=str(peer.write_rows("other.json", 1))))
    taken = "taken" if ended.code == 0 else ended.error
    found["test_other_rows_are_refused_though_they_are_as_long"] = taken
    found["test_stopped_and_resumed_is_as_never_stopped"] = _exact(bench)
    return found


def other_base(bench: Bench) -> dict[str, str]:
    """Other weights in the folder of the base model, between the kill and the same command again."""
    base = bench.peer.work / "base"
    subprocess.run(["cp", "-a", str(bench.peer.base), str(base)], check=True)
    job = bench.peer.job(base=str(base), die_at=DIES[bench.peer.name])
    bench.peer.run(job)
    other_weights(base)
    ended = bench.resume(job)
    said = ended.error
    if ended.code == 0:
        own = ended.report["digest"] == bench.intact
        said = "not noticed: the checkpoint has a base of its own" if own else "taken"
    return {"test_other_weights_are_refused": said}


def _warned(ended: Ended, setting: str) -> str:
    """What a run that went on said of a setting."""
    stem = {"batch_size": "batch_size", "learning_rate": "learning.rate|\\blr\\b"}.get(setting, setting)
    warned = re.search(r"(?:does|do) not match(.*\n)*?.*(" + stem + ")|(" + stem + r").*does not match", ended.words)
    return "taken, said in a warning" if warned else ""


def other_weights(base: Path) -> None:
    """The same names and shapes, every matrix a little otherwise."""
    from safetensors.torch import load_file, save_file

    path = base / "model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def _exact(bench: Bench) -> str:
    """Killed between two saves and taken up: the same bytes as never stopped?"""
    ways: dict[str, dict[str, Any]] = {"with dropout": {}, "without": {"dropout": 0.0}}
    if bench.peer.name == "lightning":
        ways["without, torch's own DataLoader"] = {"dropout": 0.0, "extra": "plain_loader"}
    words = []
    for way, changes in ways.items():
        whole = bench.peer.run(bench.peer.job(**changes))
        again = bench.peer.run(bench.peer.job(**changes))
        job = bench.peer.job(die_at=DIES[bench.peer.name], **changes)
        bench.peer.run(job)
        ended = bench.resume(job)
        repeats = whole.report["digest"] == again.report["digest"]
        same = ended.report.get("digest") == whole.report["digest"]
        word = "the same bytes" if same else "other bytes" if repeats else "other bytes (two whole runs differ, too)"
        words.append(f"{way}: {word if ended.code == 0 else ended.error}")
        bench.detail[f"exact {way}"] = [whole.report, again.report, ended.report]
    return "; ".join(words)


def again(bench: Bench) -> dict[str, str]:
    """Without a word of going on, in a folder with checkpoints; and a stranger's thing under a checkpoint's name."""
    job = bench.peer.job(bench.state)
    before = {path: path.read_bytes() for path in disk(job).rglob("*") if path.is_file() and path.suffix in WEIGHTS}
    ended = bench.peer.run(job | {"learning_rate": 1e-3})  # other files than those that are there
    gone = sum(not path.exists() or path.read_bytes() != data for path, data in before.items())
    lost = f"{gone} of {len(before)} files of weights and moments overwritten"
    what = f"begins anew, {lost}" if ended.code == 0 else ended.error
    job = bench.peer.job()
    place = {"transformers": "checkpoint-3/adapter_model.safetensors", "lightning": "step=3.ckpt"}
    foreign = Path(job["out"]) / place.get(bench.peer.name, "epoch_0/adapter_model.pt")
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"another tool's")
    ended = bench.peer.run(job)
    kept = foreign.exists() and foreign.read_bytes() == b"another tool's"
    stranger = ("left as it is" if kept else "overwritten") if ended.code == 0 else ended.error
    return {
        "test_an_unfinished_run_is_not_begun_anew_in_silence": what,
        "test_the_other_tool_s_checkpoint_is_left_as_it_is": stranger,
    }


PARTS: dict[str, Callable[[Bench], dict[str, str]]] = {
    "killed": killed, "damaged": damaged, "flipped": flipped, "full": full, "numbers": numbers, "base": other_base,
    "again": again, "signals": peer_processes.signals, "races": peer_processes.races, "ranks": peer_processes.ranks,
}  # fmt: skip


def measure(name: str, arguments: argparse.Namespace, work: Path, library: Path) -> Path:
    """One peer's parts; the file of its results, which has each part as soon as it has ended."""
    peer = Peer(name, arguments.python, work / "base", work, library)
    bench = Bench(peer, arguments.few)
    path = arguments.results / f"peer-faults-{name}.json"
    facts = {
        "peer": name, "measured": True, "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": sys.version.split()[0], "versions": peer.versions,
    }  # fmt: skip
    for part in arguments.parts.split(","):
        now = PARTS[part](bench)
        for test, said in now.items():
            print(f"{name:13} {test:75} {said}", flush=True)
        write(path, facts | {"faults": now, "detail": bench.detail})
    peer.close()
    return path


def untied(source: Path, target: Path) -> None:
    """The model with a head of its own, as torchtune's LLaMA 2 has one."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    model.save_pretrained(target)


def write(path: Path, result: dict[str, Any]) -> None:
    """One file a peer; what was not run this time stays as it was."""
    if path.exists():
        older = json.loads(path.read_text())
        result = result | {key: older[key] | result[key] for key in ("faults", "detail")}
    path.write_text(json.dumps(result, indent=1, default=str) + "\n")


def columns(text: str, results: dict[str, dict[str, Any]]) -> str:
    """The page's text with the peers' cells from their results. A row that no peer was put to says so."""
    head, begin, table = text.partition("| fault | what happens |")
    rows, end, rest = (begin + table).partition("\n\n")
    lines = []
    for number, line in enumerate(rows.splitlines()):
        cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
        if number == 0:
            middle = [f" {PEERS[name]} " for name in results]
        elif number == 1:
            middle = ["---"] * len(results)
        else:
            test = re.search(r"`(test_\w+)`", cells[-1])
            name = test[1] if test else ""
            middle = [f" {each['faults'].get(name) or NOT_TRIED.get(name, 'not tried')} " for each in results.values()]
        lines.append("|" + "|".join([*cells[:2], *middle, cells[-1]]) + "|")
    return head + "\n".join(lines) + end + rest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", type=Path)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--parts", default=",".join(PARTS), help="of these, those to run")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has the peers")
    parser.add_argument("--few", action="store_true", help="a handful of kills and flips")
    parser.add_argument("--results", type=Path, default=BENCH / "results")
    parser.add_argument("--docs", action="store_true", help="only write the peers' columns of docs/reliability.md")
    arguments = parser.parse_args()
    if arguments.docs:
        found = {name: json.loads((arguments.results / f"peer-faults-{name}.json").read_text()) for name in PEERS}
        DOCS.write_text(columns(DOCS.read_text(encoding="utf-8"), found), encoding="utf-8")
        return 0
    if arguments.base_model is None:
        parser.error("--base_model names the folder of a small LLaMA")
    # A shell's background job ignores SIGINT, and so would all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    failed = 0
    for name in arguments.peers.split(","):
        with tempfile.TemporaryDirectory(prefix="jindo-peers-", ignore_cleanup_errors=True) as folder:
            work = Path(folder)
            library = work / "peer_disk.so"
            compiler = os.environ.get("CC", "cc")
            source = BENCH / "peer_disk.c"
            subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
            untied(arguments.base_model, work / "base")
            try:
                print(f"written to {measure(name, arguments, work, library)}")
            except ModuleNotFoundError as error:
                print(f"{name} is left out: {error}")
                failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
