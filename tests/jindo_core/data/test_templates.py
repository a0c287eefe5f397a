"""Templates: the published texts exactly, filling, the user's own files, and what is refused."""

from __future__ import annotations

import json

import pytest

from jindo_core.data.records import Record, Round
from jindo_core.data.templates import Segment, SingleTurnTemplate, load_template, template_names
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
KULLM = "요청을 적절히 완료하는 응답을 작성하세요.\n\n### 명령어:\n{instruction}\n\n"
KOALPACA = "### Instruction(명령어):\n{instruction}\n\n"
PUBLISHED = {
    "qlora_alpaca": (ALPACA[0][:-1] + " ", ALPACA[1][:-1] + " ", ALPACA[2]),
    "wizard_7b": ("{instruction}\n{input}\n\n### Response:", "{instruction}\n\n### Response:", "### Response:"),
    "koalpaca_v1.0": (
        "Below is an instruction that describes a task, paired with an input that provides further context.\n"
        "아래는 작업을 설명하는 명령어와 추가적 맥락을 제공하는 입력이 짝을 이루는 예제입니다.\n\n"
        "Write a response that appropriately completes the request.\n요청을 적절히 완료하는 응답을 작성하세요.\n\n"
        + KOALPACA + "### Input(입력):\n{input}\n\n### Response(응답):",
        "Below is an instruction that describes a task.\n아래는 작업을 설명하는 명령어입니다.\n\n"
        "Write a response that appropriately completes the request.\n"
        "명령어에 따른 요청을 적절히 완료하는 응답을 작성하세요.\n\n" + KOALPACA + "### Response(응답):",
        "### Response(응답):",
    ),
    "koalpaca_v1.1": (
        "### 질문: {instruction}\n\n### 맥락: {input}\n\n### 답변:",
        "### 질문: {instruction}\n\n### 답변:",
        "### 답변:",
    ),
    "kullm": (
        "아래는 작업을 설명하는 명령어와 추가 컨텍스트를 제공하는 입력이 짝을 이루는 예제입니다. "
        + KULLM + "### 입력:\n{input}\n\n### 응답:\n",
        "아래는 작업을 설명하는 명령어입니다. " + KULLM + "### 응답:\n",
        "### 응답:",
    ),
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
SINGLE = {*PUBLISHED, "korean_short"}
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
# A conversation of two rounds (the first with an input), with the message "S" and with the template's own.
CHATS = {
    "vicuna_v1.1": ("S USER: u\n\ni ASSISTANT: a{eos}USER: v ASSISTANT: b{eos}", VICUNA),
    "wizard_13b": ("S USER: u\n\ni ASSISTANT: a{eos}USER: v ASSISTANT: b{eos}", VICUNA),
    "none": ("S\n\nu\n\nia{eos}vb{eos}", ""),
    "guanaco": ("S\n### Human: u\n\ni### Assistant: a{eos}### Human: v### Assistant: b{eos}", ""),
    "orca": (
        "### System:\nS\n\n### User:\nu\n\n### Input:\ni\n\n### Response:\na{eos}\n\n"
        "### User:\nv\n\n### Response:\nb{eos}",
        "### System:\nYou are an AI assistant that follows instruction extremely well. Help as much as you can.\n\n",
    ),
    "llama2_chat": (
        "{bos}[INST] <<SYS>>\nS\n<</SYS>>\n\nu\n\ni [/INST] a {eos}{bos}[INST] v [/INST] b {eos}", "{bos}[INST] "
    ),
    "llama3": (
        "{bos}<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nu\n\ni<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nv<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>",
        "{bos}<|start_header_id|>user",
    ),
    "chatml": (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nu\n\ni<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\nv<|im_end|>\n<|im_start|>assistant\nb<|im_end|>",
        "<|im_start|>user\n",
    ),
}


@pytest.mark.parametrize("name", CHATS)
def test_conversations_are_exact(name):
    template = load_template(name)
    rounds = (Round("u", "i", "a"), Round("v", "", "b"))
    whole, opening = CHATS[name]
    segments = template.render(Record(rounds, system="S"))
    assert "".join(segment.text for segment in segments) == whole
    assert "".join(segment.text for segment in template.render(Record(rounds))).startswith(opening)
    assert [segment.text.strip() for segment in segments if segment.kind == "answer"] == ["a", "b"]
    end = "<|eot_id|>" if name == "llama3" else "<|im_end|>" if name == "chatml" else "{eos}"
    assert [segment.text for segment in segments if segment.kind == "end"] == [end, end]
    texts = [segment.text for segment in segments if segment.kind == "text"]
    assert texts == ["S", "u", "i", "v"]
    asked = template.render(Record(rounds, system="S"), open=True)
    assert asked == segments[: len(asked)]
    assert segments[len(asked)].kind == "answer"
    assert template.description
    assert (template.single_turn, template.brings_bos) == (False, name in ("llama2_chat", "llama3"))


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
    assert SINGLE | CHATS.keys() == set(template_names())
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


def test_an_answer_of_its_own(tmp_path):
    """KoAlpaca 1.1 was trained on a space before the answer, which the model writes itself."""
    template = load_template("koalpaca_v1.1")
    segments = template.render(Record((Round("가", "나", "{output}"),)))
    assert "".join(segment.text for segment in segments) == "### 질문: 가\n\n### 맥락: 나\n\n### 답변: {output}{eos}"
    assert segments[-2] == Segment(" {output}", "answer")
    assert template.prompt("가") == "### 질문: 가\n\n### 답변:"
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({**OWN, "answer": "<{output}>"}), encoding="utf-8")
    assert load_template(file).render(Record.single("a", "", "b"))[-2] == Segment("<b>", "answer")
    assert load_template(file).identity() != SingleTurnTemplate("mine", "", *OWN.values()).identity()


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("llama-2-chat", "llama2_chat"), ("Llama-2", "llama2_chat"), ("llama-3", "llama3"), ("vicuna", "vicuna_v1.1"),
        ("vicuna-v1_1", "vicuna_v1.1"), ("wizard_7B", "wizard_7b"), ("Wizard-13B", "wizard_13b"), ("ChatML", "chatml"),
        ("KoAlpaca-v1.1", "koalpaca_v1.1"), ("qlora", "qlora_alpaca"),
    ],
)  # fmt: skip
def test_names_in_other_spellings(asked, name):
    assert load_template(asked) == load_template(name)


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
        ({"answer": "x"}, r"answer is 'x', expected \{output\} in it once"),
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


# --- conversations ----------------------------------------------------------------------------------------


def test_a_single_turn_template_says_its_preamble_once():
    template = load_template("alpaca")
    segments = template.render(Record((Round("u", "i", "a"), Round("v", "", "b"))))
    assert "".join(segment.text for segment in segments) == (
        ALPACA[0].format(instruction="u", input="i") + "a{eos}### Instruction:\nv\n\n### Response:\nb{eos}"
    )
    shorter = load_template("koalpaca_v1.0").render(Record((Round("u", "", "a"), Round("v", "", "b"))))
    assert "".join(segment.text for segment in shorter[4:]).startswith("{eos}### Instruction(명령어):\nv")


def test_a_system_message_that_has_no_place_is_refused(tmp_path):
    record = Record((Round("u", "", "a"),), system="S", row=7)
    with pytest.raises(InputError, match=r"row 7 has a system message, for which template alpaca has no place.*orca"):
        load_template("alpaca").render(record)
    file = tmp_path / "t.json"
    file.write_text(json.dumps({"user_turn": "U {user} ", "end": "{eos}"}), encoding="utf-8")
    with pytest.raises(InputError, match=r"row 7 .* give the template a system_turn"):
        load_template(file).render(record)


def test_formatted_rows_are_as_they_are():
    for name in ("alpaca", "vicuna_v1.1", "llama2_chat"):
        record = Record((Round("Q {input}", "", " A"),), formatted=True)
        segments = [Segment("Q {input}", "text"), Segment(" A", "answer"), Segment("{eos}", "end")]
        assert load_template(name).render(record) == segments
        assert load_template(name).render(record, open=True) == segments[:1]


OWN_CHAT = {
    "system": "친절하게.", "system_turn": "[{system}]", "user_turn": "<{user}>", "with_input": "{input}/{instruction}",
    "assistant_turn": "=", "answer": "~{output}", "end": "{eos}", "after": "\n", "begin": "{bos}", "strip": True,
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_an_own_conversation(tmp_path, suffix):
    file = tmp_path / f"mine{suffix}"
    file.write_text(json.dumps(OWN_CHAT, ensure_ascii=False), encoding="utf-8")
    template = load_template(file)
    text = "".join(s.text for s in template.render(Record((Round(" {input} ", " {user}", "{end} "), Round("v")))))
    assert text == "{bos}[친절하게.]<{user}/{input}>=~{end}{eos}\n<v>=~{eos}"
    assert template.name == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_turn": "no field"}, r"user_turn holds no field, expected \{user\} once"),
        ({"user_turn": "{user}{user}"}, r"user_turn holds \{user\} and \{user\}, expected \{user\} once"),
        ({"user_turn": "{user}{output}"}, r"user_turn holds \{user\} and \{output\}"),
        ({"answer": "x"}, r"answer holds no field, expected \{output\} once"),
        ({"with_input": "{input}"}, r"with_input holds \{input\}, expected \{instruction\} once and \{input\} once"),
        ({"system_turn": "x"}, r"system_turn holds no field, expected \{system\} once"),
        ({"system_turn": None}, "system_turn is None, expected text"),
        ({"begin": "{user}"}, r"begin holds \{user\}, expected none"),
        ({"end": " "}, "end is empty, expected {eos} or a special token's text"),
        ({"strip": "yes"}, "strip is 'yes', expected true or false"),
        ({"asistant_turn": "x"}, r"unknown key 'asistant_turn'.*Did you mean 'assistant_turn'\?"),
    ],
)
def test_a_conversation_that_is_wrong(tmp_path, change, message):
    file = tmp_path / "t.json"
    file.write_text(json.dumps({**OWN_CHAT, **change}), encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        load_template(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["user_turn", "end", "system_turn"])
def test_a_conversation_that_lacks_a_key(tmp_path, key):
    file = tmp_path / "t.json"
    file.write_text(json.dumps({k: v for k, v in OWN_CHAT.items() if k != key}), encoding="utf-8")
    with pytest.raises(InputError, match=f"lacks {key}"):
        load_template(file)
