"""The recipe `korean`, and the steps that need more than one row or file, from file to file."""

from __future__ import annotations

import json

import pytest

from jindo_core.data_config import CleanConfig
from jindo_core.refinery.cleaning import clean


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def run(tmp_path, data, recipe, **more):
    """What is written, and the report."""
    out = tmp_path / "out.jsonl"
    report = clean(CleanConfig(data_path=str(data), output_path=str(out), recipe=str(recipe), workers=1, **more))
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()], report


def steps_of(report):
    return {step.name: step for step in report.steps}


def test_the_recipe_on_rows_of_each_dirt(tmp_path):
    seed = "translate the following into English"
    fence = "```python\nprint('lamp')\n```"
    restored = f"o 전등을 출력합니다:\r\n {fence}\r\n인쇄\r\n {fence}"
    rows = [
        {"instruction": seed, "input": "To print a lamp:\n" + fence, "output": restored},
        {"instruction": seed, "input": "The harbour was quiet at dawn.", "output": "Il porto era tranquillo all'alba."},
        {"instruction": "무엇을 하나요?", "input": "", "output": "AI 언어 모델로서 그 일은 할 수 없습니다."},
        {"instruction": "인사", "input": "", "output": "반갑습니다. 잘 지냈어?"},
        {"instruction": "인사", "input": "", "output": "반갑습니다. 잘  지냈어?"},
    ]
    flagged = tmp_path / "flagged.jsonl"
    written, report = run(tmp_path, write(tmp_path / "in.jsonl", rows), "korean", flagged_path=str(flagged))
    assert written == [
        {
            "instruction": "Translate the following into Korean",
            "input": "To print a lamp:\n" + fence,
            "output": f"전등을 출력합니다:\n{fence}",
        },
        rows[3],
    ]
    steps = steps_of(report)
    assert {name: step.rejected for name, step in steps.items() if step.rejected} == {
        "hangul_ratio": 1,
        "refusals": 1,
        "exact_duplicates": 1,
    }
    assert steps["honorifics"].flagged == 2
    assert steps["honorifics"].found == {"합쇼체": 2, "반말": 2}
    assert "answer 1 mixes 합쇼체 1, 반말 1" in flagged.read_text(encoding="utf-8")


def test_two_files_are_paired_by_id(tmp_path):
    def row(key, *texts):
        who = ("human", "gpt")
        return {"id": key, "conversations": [{"from": who[n % 2], "value": text} for n, text in enumerate(texts)]}

    folder = tmp_path / "both"
    folder.mkdir()
    write(folder / "en.jsonl", [row("a", "How are you today?", "Fine, thanks."), row("b", "Who is there?", "A lamp.")])
    write(folder / "ko.jsonl", [row("c", "혼자인 글", "네."), row("a", "오늘 어떠세요?", "좋아요, 고마워요.")])
    recipe = tmp_path / "pairs.yaml"
    recipe.write_text("steps: [pair_by_id, separate_rounds]\n", encoding="utf-8")
    written, report = run(tmp_path, folder, recipe)
    said = [[turn["value"] for turn in each["conversations"]] for each in written]
    assert said == [
        ["Translate the following into Korean\n\nHow are you today?", "오늘 어떠세요?"],
        ["Translate the following into Korean\n\nFine, thanks.", "좋아요, 고마워요."],
    ]
    joined = steps_of(report)["pair_by_id"]
    assert (joined.rows_in, joined.changed, joined.rejected, joined.rows_out) == (4, 1, 3, 1)


def test_conversations_are_repaired_before_their_format_reads_them(tmp_path):
    rows = [
        {"conversations": [{"from": role, "value": f"{role} says {n}"} for n, role in enumerate(roles)]}
        for roles in (["gpt", "human", "gpt"], ["human", "human", "gpt", "human"], ["human"], ["human", "gpt"] * 3)
    ]
    recipe = tmp_path / "talk.yaml"
    recipe.write_text(
        "steps:\n  - conversation_roles\n  - split_conversations: {max_length: 60, per_turn: 0}\n", encoding="utf-8"
    )
    written, report = run(tmp_path, write(tmp_path / "in.jsonl", rows), recipe, dataset_format="sharegpt")
    said = [[turn["value"] for turn in each["conversations"]] for each in written]
    assert said == [
        ["human says 1", "gpt says 2"],
        ["human says 0\n\nhuman says 1", "gpt says 2"],
        ["human says 0", "gpt says 1", "human says 2", "gpt says 3"],
        ["human says 4", "gpt says 5"],
    ]
    assert (report.rows_in, report.made, report.rejected, report.rows_out) == (4, 1, 1, 4)


@pytest.fixture(scope="module")
def real_report(assets, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("real")
    data = assets / "data/ko/ko_sharegpt_deepl_translate_cleaned_v2.json"
    return run(tmp_path, data, "korean")


def test_the_real_korean_set(real_report):
    """The table of docs/korean-data.md."""
    written, report = real_report
    steps = steps_of(report)
    counts = {
        name: (step.changed, step.rejected, step.flagged)
        for name, step in steps.items()
        if step.changed or step.rejected or step.flagged
    }
    assert counts == {
        "rendered_text": (987, 0, 0),
        "line_ends": (460, 0, 0),
        "html": (0, 0, 1),
        "trailing_whitespace": (66, 0, 0),
        "pair_direction": (978, 0, 0),
        "code_fences": (97, 0, 0),
        "leading_artefacts": (40, 0, 0),
        "refusals": (0, 3, 0),
        "untranslated_residue": (0, 1, 0),
        "hangul_ratio": (0, 17, 0),
        "length_ratio": (0, 4, 0),
        "honorifics": (0, 0, 107),
        "near_duplicates": (0, 4, 0),
    }
    assert report.rows_in == 987
    assert report.rows_out == len(written) == 958


def test_the_cleaned_set_is_clean(real_report, tmp_path):
    """A second run changes nothing."""
    written, _ = real_report
    again, report = run(tmp_path, write(tmp_path / "in.jsonl", written), "korean")
    assert again == written
    assert all(step.changed == step.rejected == 0 for step in report.steps)
