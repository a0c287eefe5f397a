"""Splitting: an exact number of rows, none lost or twice, by the seed alone, in the source's form."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jindo_core.data.readers import open_rows
from jindo_core.data.writers import RowWriter
from jindo_core.data_config import SplitConfig
from jindo_core.errors import InputError
from jindo_core.refinery.split import split


def write(path, count):
    with RowWriter(path) as writer:
        for number in range(count):
            writer.write({"id": str(number), "instruction": f"q\n{number}", "output": 'a "b", c'})
    return path


def run(path, folder, **more):
    return split(SplitConfig(data_path=str(path), output_dir=str(folder), **more))


def ids(path):
    return [int(row.values["id"]) for row in open_rows(path)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(2, 60), data=st.data())
def test_in_is_train_and_test(tmp_path, count, data):
    wanted = data.draw(st.integers(1, count - 1))
    write(tmp_path / "in.jsonl", count)
    seed = data.draw(st.integers(0, 9))
    done = run(tmp_path / "in.jsonl", tmp_path / "out", test_size=float(wanted), seed=seed, overwrite=True)
    train, test = ids(tmp_path / "out" / "train.jsonl"), ids(tmp_path / "out" / "test.jsonl")
    assert (done.rows_in, done.train_rows, done.test_rows) == (count, count - wanted, wanted)
    assert (len(train), len(test)) == (count - wanted, wanted)
    assert sorted(train + test) == list(range(count))
    assert train == sorted(train)
    assert test == sorted(test)


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "tsv", "parquet", "jsonl.gz"])
def test_the_files_have_the_sources_form_and_rows_as_they_were(tmp_path, ending):
    source = write(tmp_path / f"in.{ending}", 20)
    done = run(source, tmp_path / "out", test_size=0.25)
    assert (done.train, done.test, done.test_rows) == (f"train.{ending}", f"test.{ending}", 5)
    before = {row.values["id"]: row.values for row in open_rows(source)}
    for name in ("train", "test"):
        for row in open_rows(tmp_path / "out" / f"{name}.{ending}"):
            assert row.values == before.pop(row.values["id"])
    assert not before


def test_the_seed_decides_and_every_row_is_as_likely(tmp_path):
    source = write(tmp_path / "in.jsonl", 10)
    seen = []
    for seed in (1, 1, 2):
        run(source, tmp_path / "out", test_size=3.0, seed=seed, overwrite=True)
        seen.append(ids(tmp_path / "out" / "test.jsonl"))
    assert seen[0] == seen[1] != seen[2]
    counts = Counter()
    for seed in range(100):
        run(source, tmp_path / "out", test_size=3.0, seed=seed, overwrite=True)
        counts.update(ids(tmp_path / "out" / "test.jsonl"))
    # 30 of 100 each; the standard deviation is 4.6.
    assert len(counts) == 10
    assert all(12 <= count <= 48 for count in counts.values())


def test_a_folder_of_one_kind(tmp_path):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.csv", 5)
    write(tmp_path / "in" / "b.csv", 5)
    assert run(tmp_path / "in", tmp_path / "out", test_size=4.0).rows_in == 10
    write(tmp_path / "in" / "c.jsonl", 5)
    with pytest.raises(InputError, match=r"holds .csv and .jsonl files: expected one kind"):
        run(tmp_path / "in", tmp_path / "out2")


def test_what_does_not_serve(tmp_path):
    source = write(tmp_path / "train.jsonl", 5)
    with pytest.raises(InputError, match="is what is split: expected another folder"):
        run(source, tmp_path, overwrite=True)
    run(source, tmp_path / "out")
    before = (tmp_path / "out" / "train.jsonl").read_bytes()
    with pytest.raises(InputError, match="is there already"):
        run(source, tmp_path / "out")
    with pytest.raises(InputError, match="got 5, which leaves none of 5 rows"):
        run(source, tmp_path / "out", test_size=5.0, overwrite=True)
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == before
    (tmp_path / "bad.jsonl").write_text(json.dumps({"id": "1"}) + "\n{")
    with pytest.raises(InputError, match="broken JSON"):
        run(tmp_path / "bad.jsonl", tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test.jsonl", "train.jsonl"]
    with pytest.raises(InputError, match=r"--test_size: got 1\.5, expected a number of rows"):
        SplitConfig(data_path="a.jsonl", output_dir="b", test_size=1.5)
    with pytest.raises(InputError, match="above 0"):
        SplitConfig(data_path="a.jsonl", output_dir="b", test_size=0.0)
