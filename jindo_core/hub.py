"""From the name of a model or data set to a path on this machine."""

from __future__ import annotations

from pathlib import Path

from jindo_core import embedded
from jindo_core.errors import InputError

MODEL_FILES = ["*.json", "*.safetensors", "tokenizer.model"]
OLDER_FILES = ["pytorch_model*.bin", "consolidated.*.pth"]
"""Weights of a model that was published without safetensors."""
DATA_FILES = ["*.json", "*.jsonl"]


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
        return path
    if not _looks_like_hub_id(name):
        raise InputError(f"base model {name} does not exist: expected a folder, a .gguf file or a Hub id owner/name")
    folder = _snapshot(name, "model", MODEL_FILES)
    return folder if any(folder.glob("*.safetensors")) else _snapshot(name, "model", MODEL_FILES + OLDER_FILES)


def resolve_data(name: str) -> Path:
    """A .json or .jsonl file: a path, or the one such file of a Hub data set `owner/name`.

    Raises:
        InputError: no such path; a data set not reachable, or with no file or several to choose from.
    """
    path = Path(name).expanduser()
    if _exists(path):
        return path
    if not _looks_like_hub_id(name):
        raise InputError(f"data_path {name} does not exist: expected a .json or .jsonl file or a Hub id owner/name")
    folder = _snapshot(name, "dataset", DATA_FILES)
    found = sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".jsonl") and p.name != "dataset_infos.json")
    if len(found) != 1:
        listed = ", ".join(p.name for p in found[:5]) or "none"
        raise InputError(f"data set {name} has {len(found)} json files ({listed}), expected one: give its path")
    return found[0]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long to be one
        return False


def _looks_like_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(part and part not in (".", "..", "~") for part in parts) and " " not in name


def _snapshot(repo: str, kind: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import OfflineModeIsEnabled

    # Caught by what they mean: no such repository, no network, a broken connection.
    failures = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError)
    try:
        return Path(snapshot_download(repo, repo_type=kind, allow_patterns=patterns))
    except failures as error:
        option = " --repo-type dataset" if kind == "dataset" else ""
        raise InputError(
            f"{kind} {repo} is no local path and could not be fetched from the Hugging Face Hub "
            f"({type(error).__name__}): check the name, or run 'hf download {repo}{option}' where there is a "
            "network and give the folder's path"
        ) from error
