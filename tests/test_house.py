"""The shape of the tree: which way imports run, what must not exist, what a wheel holds."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import zipfile

import pytest

# Part -> the parts it may import. Inside the engine, a module's row (the first whose names hold it) may import
# its own row and those above it.
PARTS = {"kernels": {"kernels"}, "jindo_core": {"jindo_core", "kernels"}, "cli": {"cli", "jindo_core"}}
ENGINE_ROWS = [
    {"errors"},
    {"settings", "plan", "plan_falcon", "budget", "files", "part_file", "config_json", "interrupt"},
    {"config", "config_checks", "config_files", "qlora", "families", "long_memory", "rotary"},
    {"convert_config", "data_config", "data_config_inspect", "eval_config"},
    {"nf4"},
    {"lora", "pages", "parallel"},
    {"pager"},
    {"recompute", "streaming", "head", "adamw_pages", "adamw_state", "paged_adamw"},
    {"causal_lm"},
    {"model", "falcon"},
    {"architectures"},
    {"embedded", "hub", "formats", "loader", "tokenizer", "adapters", "data", "optim", "memory"}
    | {"checkpoint", "run_record", "decoding", "generation", "batch_generation", "progress", "training_view"},
    {"compiled", "evaluate", "mmlu", "scoring", "tune", "doctor", "merge", "training_data", "run_state", "refinery"}
    | {"likelihood", "predictions", "host_memory", "reports"},
    {"prepare", "drift", "refine", "kobest", "perplexity"},
    {"feeder", "profiling"},
    {"resume", "step", "outcome", "predict", "run_card", "ceiling"},
    {"train", "convert", "evaluation"},
    {"integrations"},
]
NEVER_THE_MODEL = {"data", "optim", "paged_adamw", "pager", "pages", "tokenizer", "config", "errors"}


def modules(root, part):
    folder = root / part
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder)
        if part == "jindo_core" and inside.parts[0] in ("kernels", "cli"):
            continue  # the symlinks
        yield path, inside


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            # `from jindo_core import x` and `from jindo_core.kernels import x` import a module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(name):
    pieces = name.split(".")
    if pieces[0] != "jindo_core":
        return None
    return pieces[1] if len(pieces) > 1 and pieces[1] in ("kernels", "cli") else "jindo_core"


@pytest.mark.parametrize("part", PARTS)
def test_imports_run_one_way(repo_root, part):
    for path, _ in modules(repo_root, part):
        for name in imports(path):
            assert name.split(".")[0] not in ("kernels", "cli"), f"{path} imports {name}: use jindo_core.{name}"
            # The command line asks the package for its version: the one name above it that all may read.
            allowed = PARTS[part] | ({"cli"} if path.name == "__main__.py" else set())  # `python -m jindo_core`
            assert part_of(name) in allowed | {None}, f"{path} imports {name}"


def test_the_engine_imports_in_order(repo_root):
    row_of = {name: row for row, names in enumerate(ENGINE_ROWS) for name in names}
    for path, inside in modules(repo_root, "jindo_core"):
        own = inside.parts[0].removesuffix(".py")
        if own in ("__init__", "__main__"):
            continue
        assert own in row_of, f"{path}: give the new module its row here and in docs/design.md"
        for name in imports(path):
            pieces = name.split(".")
            if part_of(name) == "jindo_core" and len(pieces) > 1 and pieces[1] in row_of:
                assert row_of[pieces[1]] <= row_of[own], f"{path} imports {name}, which stands above it"
                assert not (own in NEVER_THE_MODEL and pieces[1] in ("model", "causal_lm")), f"{path} imports the model"


def test_kernels_and_cli_are_symlinked_and_hold_no_init(repo_root):
    for part in ("kernels", "cli"):
        link = repo_root / "jindo_core" / part
        assert link.is_symlink()
        assert os.readlink(link) == f"../{part}"
        assert not (repo_root / part / "__init__.py").exists()


def test_importing_the_package_is_light():
    code = (
        "import sys, jindo_core, jindo_core.cli.main; "
        "heavy = ('torch', 'triton', 'transformers', 'datasets', 'bitsandbytes', 'peft'); "
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_engine_needs_no_peer_and_no_triton():
    """Neither bitsandbytes, peft nor accelerate is imported at run time, nor Triton without a GPU."""
    code = (
        "import sys, torch, jindo_core as jc; "
        "w = jc.quantize_nf4(torch.randn(64, 64)); l = jc.NF4Linear(w); l(torch.randn(2, 64)); "
        "import jindo_core.train; "
        "print([m for m in ('triton.language', 'bitsandbytes', 'peft', 'accelerate') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # torch.utils may look for Triton; what must not happen is that our kernels load it.
    assert set(ast.literal_eval(done.stdout.strip())) <= {"triton.language"}
    assert "nf4_triton" not in done.stdout


def test_public_names_resolve_and_generate_stays_a_function():
    import jindo_core

    for name in jindo_core.__all__:
        assert getattr(jindo_core, name).__name__ == name
    assert callable(jindo_core.generate)


def test_files_stay_readable(repo_root):
    for part in ("kernels", "jindo_core", "cli", "tests"):
        for path, _ in modules(repo_root, part):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            assert lines <= 500, f"{path} has {lines} lines"


@pytest.fixture(scope="module")
def wheel(repo_root, tmp_path_factory):
    """A wheel built from a copy of the committed and uncommitted files, as `pip install .` would build it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=repo_root, capture_output=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (repo_root / name).exists() or (repo_root / name).is_symlink():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            if (repo_root / name).is_symlink():
                (source / name).symlink_to(os.readlink(repo_root / name))
            else:
                (source / name).write_bytes((repo_root / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), "."]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_everything_once(repo_root, wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"jindo_core"}
    for part in PARTS:
        prefix = "jindo_core/" if part == "jindo_core" else f"jindo_core/{part}/"
        for _, inside in modules(repo_root, part):
            assert prefix + inside.as_posix() in names
    assert "jindo_core/data/bundled/korean_instructions.jsonl" in names
    for template in (repo_root / "jindo_core/data/templates").glob("*.yaml"):
        assert f"jindo_core/data/templates/{template.name}" in names
    for recipe in (repo_root / "jindo_core/refinery/recipes").glob("*.yaml"):
        assert f"jindo_core/refinery/recipes/{recipe.name}" in names
    assert "jindo_core/refinery/refusals.yaml" in names
    assert {"jindo_core/py.typed", "jindo_core/kernels/crossovers.json"} <= names


def test_the_wheel_works_from_elsewhere(wheel, tmp_path):
    """Unpacked on its own, with neither the tree nor its editable install in reach."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import jindo_core; "
        "assert jindo_core.__file__.startswith(sys.argv[1]), jindo_core.__file__; "
        "from jindo_core.data.records import bundled_path, read_records; "
        "from jindo_core.data.templates import load_template; "
        "print(len(read_records(bundled_path())), load_template('alpaca').name); "
        "from jindo_core.kernels.nf4 import nf4_quantize"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    count, name = done.stdout.split()
    assert int(count) >= 300
    assert name == "alpaca"


def test_torch_is_pinned_in_one_place(repo_root):
    pins = [
        path.name
        for path in [repo_root / "Makefile", repo_root / "pyproject.toml", repo_root / ".ci/run"]
        if "torch==" in path.read_text(encoding="utf-8")
    ]
    assert pins == ["Makefile"]
