"""Templates: the published texts exactly, filling, the user's own files, and what is refused."""

from __future__ import annotations

import json

import pytest

from jindo_core.data.templates import load_template, template_names
from jindo_core.errors import InputError

ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n",
    "### Response:",
)
PUBLISHED = {
    "alpaca": ALPACA,
    "alpaca_legacy": (ALPACA[0][:-1], ALPACA[1][:-1], ALPACA[2]),
    "alpaca_short": (
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        "### Instruction:\n{instruction}\n\n### Response:\n",
        "### Response:",
    ),
    "vigogne": (
        "Ci-dessous se trouve une instruction qui décrit une tâche, associée à une entrée qui fournit un contexte "
        "supplémentaire. Écrivez une réponse qui complète correctement la demande.\n\n"
        "### Instruction:\n{instruction}\n\n### Entrée:\n{input}\n\n### Réponse:\n",
        "Ci-dessous se trouve une instruction qui décrit une tâche. Écrivez une réponse qui complète correctement "
        "la demande.\n\n### Instruction:\n{instruction}\n\n### Réponse:\n",
        "### Réponse:",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_texts_are_exact(name):
    template = load_template(name)
    assert template.name == name
    assert (template.prompt_input, template.prompt_no_input, template.response_split) == PUBLISHED[name]
    assert template.description


@pytest.mark.parametrize("name", PUBLISHED)
def test_filling_is_upstreams_format(name):
    with_input, without, _ = PUBLISHED[name]
    template = load_template(name)
    assert template.prompt("요약하세요", "글") == with_input.format(instruction="요약하세요", input="글")
    for nothing in (None, ""):
        assert template.prompt("요약하세요", nothing) == without.format(instruction="요약하세요")


def test_every_template_loads_and_finds_its_answer():
    assert SINGLE | CHATS == set(template_names())
    for name in SINGLE:
        template = load_template(name)
        for given in (None, "입력"):
            prompt = template.prompt("지시", given)
            assert template.response(prompt + " 답 \n") == "답"
            assert template.response(prompt) == ""


def test_korean_short():
    template = load_template("korean_short")
    assert template.prompt("수도는?") == "수도는?\n→"
    assert template.prompt("요약해 줘.", "긴 글") == "요약해 줘.\n긴 글\n→"


def test_fields_inside_a_row_stay_literal():
    template = load_template("alpaca_short")
    prompt = template.prompt("Explain {input} and {instruction}, {0} and {{x}}.", "{instruction}")
    assert "### Instruction:\nExplain {input} and {instruction}, {0} and {{x}}.\n" in prompt
    assert "### Input:\n{instruction}\n" in prompt
    assert r"\1 \g<0>" in template.prompt(r"\1 \g<0>")


def test_response_takes_the_last_split_or_everything():
    template = load_template("alpaca")
    assert template.response("a ### Response: b ### Response:\n c ") == "c"
    assert template.response(" just an answer\n") == "just an answer"


OWN = {"prompt_input": "{instruction}|{input}=", "prompt_no_input": "{instruction}=", "response_split": "="}


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_own_files(tmp_path, suffix, mark):
    file = tmp_path / f"mine{suffix}"
    file.write_text(mark + json.dumps({**OWN, "description": "한글"}, ensure_ascii=False), encoding="utf-8")
    for path in (file, str(file)):
        template = load_template(path)
        assert (template.name, template.description) == ("mine", "한글")
        assert template.prompt("a", "b") == "a|b="


def test_a_name_that_is_unknown():
    with pytest.raises(InputError, match=r"'alpaka' is unknown.*Did you mean 'alpaca'\?"):
        load_template("alpaka")
    with pytest.raises(InputError, match="is unknown"):
        load_template("../templates/alpaca")
    with pytest.raises(InputError, match="is unknown"):
        load_template("")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_input": None}, "prompt_input is None, expected text"),
        ({"response_split": 3}, "response_split is 3, expected text"),
        ({"response_split": " "}, "response_split is empty"),
        ({"prompt_no_input": "no field"}, r"prompt_no_input holds no field, expected \{instruction\}"),
        ({"prompt_no_input": "{instruction}{input}"}, r"holds \{instruction\} and \{input\}, expected"),
        ({"prompt_input": "{instruction}"}, r"holds \{instruction\}, expected \{instruction\} and \{input\}"),
        ({"respons_split": "x"}, r"unknown key 'respons_split'.*Did you mean 'response_split'\?"),
    ],
)
def test_a_template_that_is_wrong(tmp_path, change, message):
    file = tmp_path / "t.json"
    file.write_text(json.dumps({**OWN, **change}), encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        load_template(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", OWN)
def test_a_template_that_lacks_a_key(tmp_path, key):
    file = tmp_path / "t.yaml"
    file.write_text(json.dumps({k: v for k, v in OWN.items() if k != key}), encoding="utf-8")
    with pytest.raises(InputError, match=f"lacks {key}"):
        load_template(file)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.json", b"{", "line 1: broken JSON"),
        ("t.yaml", b"a: 'x\nb: [", "broken YAML"),
        ("t.yaml", b"a: \xff", "no UTF-8"),
        ("t.yaml", b"- a\n", "is a list"),
        ("t.json", b"", "broken JSON"),
        ("t.yaml", b"", "is a NoneType"),
    ],
)
def test_a_file_that_is_no_template(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        load_template(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_template(tmp_path / "t.yaml")
