"""From the name of a model or data set to a path on this machine."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from jindo_core import embedded
from jindo_core.errors import InputError

MODEL_FILES = ["*.json", "*.safetensors", "tokenizer.model"]
OLDER_FILES = ["pytorch_model*.bin", "consolidated.*.pth"]
"""Weights of a model that was published without safetensors."""
_OF_A_MODEL = ("config.json", "params.json", "tokenizer.json", "tokenizer.model", "adapter_config.json")
"""One of these at least is in the folder of a model, or of a tokenizer."""
DATA_ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
"""What files of rows end in; all but Parquet's may be compressed, with .gz after it."""
HUB = "hf://datasets/"
_TRAINING_FILES = {
    "laion/OIG": ("unified_chip2.jsonl", None),
    "yizhongw/self_instruct": ("self_instruct/train/*.parquet", "refs/convert/parquet"),
    "Anthropic/hh-rlhf": ("*/train.jsonl.gz", None),
}
"""qlora's data sets of files whose names don't say which to train on, and the branch they are in (one that is a script
has its rows only in the Hub's own conversion)."""


def resolve_model(name: str | None) -> Path:
    """A folder in Hugging Face's or Meta's layout, or a .gguf file.

    Args:
        name: a path; a Hub id (`owner/name`: its cache, else a download); "smollm2-135m-instruct" or None
            for the embedded model.
    Raises:
        InputError: no such path, or a Hub id that is neither cached nor reachable.
    """
    if name is None or name == embedded.NAME:
        return embedded.embedded_model()
    path = Path(name).expanduser()
    if _exists(path) and path.is_file() and path.suffix != ".gguf":
        raise InputError(f"base model {name} is a file, expected the folder that holds it, or a .gguf file")
    if _exists(path):
        if path.is_dir() and path.suffix != ".gguf" and not any((path / file).exists() for file in _OF_A_MODEL):
            inside = next(iter(sorted(path.glob("*.gguf"))), None)
            hint = f"; give the file, {inside}" if inside else ""
            raise InputError(f"base model {name}: no model here, expected config.json or params.json in it{hint}")
        return path
    if not looks_like_hub_id(name):
        raise InputError(f"base model {name} does not exist: expected a folder, a .gguf file or a Hub id owner/name")
    folder = _snapshot(name, "model", MODEL_FILES)
    return folder if any(folder.glob("*.safetensors")) else _snapshot(name, "model", MODEL_FILES + OLDER_FILES)


def holds_model(folder: str | Path) -> bool:
    """Whether it is a model's folder, and no adapter's."""
    path = Path(folder).expanduser()
    return (path / "config.json").exists() and not (path / "adapter_config.json").exists()


def resolve_data(name: str) -> Path:
    """A file or folder of rows, or a pattern of files: a path, or what a Hub data set has to train on.

    Args:
        name: a path or a pattern (`data/train-*.parquet`); a Hub id `owner/name`, whose one data file it is, or whose
            shards named train, or what is known of it; `hf://datasets/owner/name/FILE` (or a pattern) chooses.
    Raises:
        InputError: no such path; a data set not reachable, or with no file or several to choose from.
    """
    path = Path(name).expanduser()
    if _exists(path) or (glob.has_magic(name) and glob.glob(str(path))):
        return path
    if glob.has_magic(name) and not name.startswith(HUB):
        raise InputError(f"data_path {name}: no file matches this pattern")
    parts = name.removeprefix(HUB).split("/", 2)
    repo, file = "/".join(parts[:2]), "".join(parts[2:])
    is_file = not name.startswith(HUB) and (file or name.endswith(DATA_ENDINGS))  # a path that was mistyped
    if is_file or not looks_like_hub_id(repo):
        endings = ", ".join(DATA_ENDINGS)
        hint = "; several are separated by spaces, not commas" if "," in name else ""
        raise InputError(f"data_path {name} does not exist: expected a file ({endings}), a folder or a Hub id{hint}")
    if file:
        return _chosen(repo, file, None)
    if repo in _TRAINING_FILES:
        return _chosen(repo, *_TRAINING_FILES[repo])
    patterns = [f"*{ending}" for ending in DATA_ENDINGS]
    folder = _snapshot(repo, "dataset", [*patterns, *(f"{pattern}.gz" for pattern in patterns)])
    found = sorted(p for p in folder.rglob("*") if _is_data(p))
    if len(found) == 1:
        return found[0]
    shards = [p for p in found if re.search(r"(^|[-_.])train([-_.]|$)", p.name)]
    if shards and {(p.parent, p.suffix) for p in shards} == {(shards[0].parent, shards[0].suffix)}:
        pattern = Path(glob.escape(str(shards[0].parent))) / f"*train*{shards[0].suffix}"
        if sorted(glob.glob(str(pattern))) == [str(p) for p in shards]:
            return pattern
    listed = ", ".join(str(p.relative_to(folder)) for p in found[:5]) or "none"
    raise InputError(
        f"data set {repo} has {len(found)} data files ({listed}), expected one, or parts named train: choose with "
        f"{HUB}{repo}/FILE"
    )


def _chosen(repo: str, file: str, revision: str | None) -> Path:
    folder = _snapshot(repo, "dataset", [file], revision)
    if (folder / file).is_file():
        return folder / file
    pattern = Path(glob.escape(str(folder))) / file
    if not glob.glob(str(pattern)):
        raise InputError(f"data set {repo} has no file {file}: expected one of its own; see its page on the Hub")
    return pattern


def _is_data(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith(DATA_ENDINGS) and path.name != "dataset_infos.json"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long to be one
        return False


def looks_like_hub_id(name: str) -> bool:
    """Whether a name has the form owner/name, which a path may have too."""
    parts = name.split("/")
    return len(parts) == 2 and all(part and part not in (".", "..", "~") for part in parts) and " " not in name


def _snapshot(repo: str, kind: str, patterns: list[str], revision: str | None = None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import OfflineModeIsEnabled

    # Caught by what they mean: no such repository, no network, a broken connection.
    failures = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError)
    try:
        return Path(snapshot_download(repo, repo_type=kind, allow_patterns=patterns, revision=revision))
    except failures as error:
        option = " --repo-type dataset" if kind == "dataset" else ""
        raise InputError(
            f"{kind} {repo} is no local path and could not be fetched from the Hugging Face Hub "
            f"({type(error).__name__}): check the name, or run 'hf download {repo}{option}' where there is a "
            "network and give the folder's path"
        ) from error
