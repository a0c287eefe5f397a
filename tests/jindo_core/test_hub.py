"""What is fetched from the Hub: safetensors, and older weights only where there are none; the rows to train on."""

from __future__ import annotations

import fnmatch

import pytest

from jindo_core import hub
from jindo_core.data.readers import open_rows
from jindo_core.errors import InputError


@pytest.mark.parametrize(("published", "calls"), [("model.safetensors", 1), ("pytorch_model.bin", 2)])
def test_older_weights_only_without_safetensors(tmp_path, monkeypatch, published, calls):
    asked = []

    def snapshot(repo, *, repo_type, allow_patterns, revision):
        asked.append(allow_patterns)
        if published.endswith(".safetensors") or "pytorch_model*.bin" in allow_patterns:
            (tmp_path / published).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert hub.resolve_model("owner/name") == tmp_path
    assert len(asked) == calls
    assert not any("bin" in pattern for pattern in asked[0])
    assert (tmp_path / published).exists()


@pytest.fixture
def data_set(tmp_path, monkeypatch):
    """A Hub that has one data set, of these files; what was asked of it."""
    asked = []

    def snapshot(repo, *, repo_type, allow_patterns, revision):
        asked.append((repo, repo_type, revision))
        kept = {name for name in published for pattern in allow_patterns if fnmatch.fnmatch(name, pattern)}
        for name in kept:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("{}")
        return str(tmp_path)

    published = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return published, asked


@pytest.mark.parametrize(
    ("name", "files", "read"),
    [
        ("owner/name", ["README.md", "rows.json", "dataset_infos.json"], ["rows.json"]),
        ("owner/name", ["data/rows.csv"], ["data/rows.csv"]),
        ("owner/name", ["rows.jsonl.gz", "model.py"], ["rows.jsonl.gz"]),
        (
            "owner/name",
            [
                "data/train-00000-of-00002.parquet",
                "data/train-00001-of-00002.parquet",
                "data/test-00000-of-00001.parquet",
            ],
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        ),
        ("owner/name", ["best_replies_train.jsonl", "best_replies_eval.jsonl"], ["best_replies_train.jsonl"]),
        ("hf://datasets/owner/name/b.tsv", ["a.tsv", "b.tsv"], ["b.tsv"]),
        (
            "hf://datasets/owner/name/sub/x*.json",
            ["sub/x1.json", "sub/x2.json", "sub/y.json"],
            ["sub/x1.json", "sub/x2.json"],
        ),
        ("laion/OIG", ["unified_chip2.jsonl", "unified_other.jsonl"], ["unified_chip2.jsonl"]),
        (
            "Anthropic/hh-rlhf",
            ["harmless-base/train.jsonl.gz", "harmless-base/test.jsonl.gz", "helpful-base/train.jsonl.gz"],
            ["harmless-base/train.jsonl.gz", "helpful-base/train.jsonl.gz"],
        ),
    ],
)
def test_the_rows_of_a_data_set(data_set, tmp_path, name, files, read):
    published, asked = data_set
    published += files
    assert [str(path.relative_to(tmp_path)) for path in open_rows(name).paths] == read
    assert {kind for _, kind, _ in asked} == {"dataset"}
    assert asked[0][0] == name.removeprefix(hub.HUB).split("/sub")[0].removesuffix("/b.tsv")


def test_a_data_set_that_is_a_script_is_read_in_the_hubs_conversion(data_set):
    published, asked = data_set
    published += ["self_instruct/train/0000.parquet"]
    assert hub.resolve_data("yizhongw/self_instruct").name == "*.parquet"
    assert asked == [("yizhongw/self_instruct", "dataset", "refs/convert/parquet")]


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        (
            "owner/name",
            ["a.json", "b.json"],
            r"has 2 data files \(a.json, b.json\), expected one, .*hf://datasets/owner/name/FILE",
        ),
        ("owner/name", ["README.md"], r"has 0 data files \(none\)"),
        ("owner/name", ["x/train.json", "y/train.json"], "has 2 data files"),
        ("hf://datasets/owner/name/c.json", ["a.json"], "has no file c.json"),
    ],
)
def test_a_data_set_without_one_choice(data_set, name, files, message):
    data_set[0].extend(files)
    with pytest.raises(InputError, match=message):
        hub.resolve_data(name)


def test_without_a_network_the_error_says_what_to_do(monkeypatch):
    from huggingface_hub.utils import OfflineModeIsEnabled

    def offline(*args, **kwargs):
        raise OfflineModeIsEnabled

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(InputError, match=r"could not be fetched .*hf download owner/name --repo-type dataset"):
        open_rows("owner/name")


@pytest.mark.parametrize(
    "name", ["rows.json", "data/rows.jsonl", "a/b/c", "a/b/rows.csv", "/none/at/all", "two words/x"]
)
def test_a_path_that_was_mistyped_is_not_asked_for(data_set, name):
    with pytest.raises(InputError, match="does not exist"):
        hub.resolve_data(name)
    assert data_set[1] == []
