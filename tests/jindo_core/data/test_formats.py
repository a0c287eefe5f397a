"""Formats: each found by its columns, what its rows become, and what is refused, with the row."""

from __future__ import annotations

import json
import pickle
import re

import pytest

from jindo_core.data.formats import FORMATS, detect_format, named_dataset
from jindo_core.data.readers import Row, open_rows
from jindo_core.data.records import Record, Round, read_records
from jindo_core.data.turns import RowError, conversation, conversation_turns
from jindo_core.errors import InputError


def row(**values):
    return Row(1, "row 1", values)


def one(instruction, input="", output="", system="", formatted=False):
    return Record((Round(instruction, input, output),), system, formatted, 1)


def turns(*texts, who=("human", "gpt"), keys=("from", "value")):
    return [{keys[0]: who[index % len(who)], keys[1]: text} for index, text in enumerate(texts)]


MESSAGES = turns("s", "q", "a", who=("system", "user", "assistant"), keys=("role", "content"))
PARTS = [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]}]
PARTS += [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
TWO = (Round("q", "", "a"), Round("r", "", "b"))
ROUNDS = Record(TWO, row=1)
SPOKEN = Record((Round("q", "", "a"),), "s", row=1)
CHIP2 = {"text": "<human>: q\n둘\n<bot>: a: b\n\nc"}

# The format that is found, a row, and what it becomes.
FOUND = [
    ("alpaca", {"instruction": "i", "input": "n", "output": "o"}, one("i", "n", "o")),
    ("alpaca", {"instruction": "i", "output": "o"}, one("i", "", "o")),
    ("alpaca", {"instruction": "i", "input": None, "output": "o"}, one("i", "", "o")),
    ("alpaca", {"instruction": "i", "input": "n", "output": "o", "text": "### rendered"}, one("i", "n", "o")),
    ("alpaca", {"id": "kullm", "instruction": "i", "input": "", "output": "o", "prompt": "p"}, one("i", "", "o")),
    ("alpaca", {"instruction": "i", "output": "o", "system": "s"}, one("i", "", "o", "s")),
    ("koalpaca", {"instruction": "i", "output": "o", "url": "https://kin.example"}, one("i", "", "o")),
    ("self-instruct-seeds", {"instruction": "i", "instances": [{"input": "n", "output": "o"}]}, one("i", "n", "o")),
    ("self-instruct", {"prompt": "p ", "completion": " c"}, one("p ", "", " c", formatted=True)),
    ("input-output", {"input": "p", "output": "c", "source": "x"}, one("p", "", "c", formatted=True)),
    ("input-output", {"input": "p", "output": "c", "prompt": "x", "text": "y"}, one("p", "", "c", formatted=True)),
    ("hh-rlhf", {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "x"},
     one("", "", "\n\nHuman: q\n\nAssistant: a", formatted=True)),
    ("text", {"text": "### Human: q### Assistant: a"}, one("", "", "### Human: q### Assistant: a", formatted=True)),
    ("chip2", CHIP2, one("q\n둘", "", "a: b\n\nc", formatted=True)),
    ("chip2", {"text": "<human>: q\n<bot>: a\n<human>: r\n<bot>: b"}, Record(TWO, formatted=True, row=1)),
    ("orca", {"id": 1, "system_prompt": "s", "question": "q", "response": "a"}, SPOKEN),
    ("orca", {"system_prompt": None, "question": "q", "response": "a"}, one("q", "", "a")),
    ("orca", {"system": "s", "question": "q", "chosen": "a", "rejected": "x"}, SPOKEN),
    ("orca-dpo", {"input": {"messages": MESSAGES[:2]}, "preferred_output": MESSAGES[2:]}, SPOKEN),
    ("qa", {"Q": "q", "A": "a", "label": "0"}, one("q", "", "a")),
    ("qa", {"question": "q", "answer": "a"}, one("q", "", "a")),
    ("messages", {"messages": MESSAGES, "prompt": "q"}, SPOKEN),
    ("messages", {"messages": PARTS}, one("qr", "", "a")),
    ("sharegpt", {"id": "x", "conversations": turns("q", "a", "r", "b")}, ROUNDS),
    ("sharegpt", {"items": turns("q", "a", "r", "b", who=("User", "Bing"))}, ROUNDS),
    ("sharegpt", {"conversation": turns("q", "a", keys=("role", "content")), "system": "s"}, SPOKEN),
    ("sharegpt", {"conversations": turns("s", "q", "a", who=("system", "human", "chatgpt")), "system": "t"}, SPOKEN),
]  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def make(*rows, name="a.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(values, ensure_ascii=False) for values in rows), encoding="utf-8")
        return path

    return make


@pytest.mark.parametrize(("name", "values", "record"), FOUND)
def test_a_format_is_found_by_its_columns(write, name, values, record):
    path = write(values)
    found = detect_format(open_rows(path))
    assert found.name == name
    assert read_records(path) == [record]
    assert read_records(path, name) == [record]
    assert pickle.loads(pickle.dumps(found)).record(row(**values)) == record, "it goes to worker processes"


@pytest.mark.parametrize(
    ("name", "like", "values"),
    [
        ("alpaca-clean", "alpaca", {"instruction": "i", "input": "n", "output": "o"}),
        ("kullm", "alpaca", {"instruction": "i", "input": "n", "output": "o"}),
        ("koalpaca", "alpaca", {"instruction": "i", "input": "n", "output": "o"}),
        ("wizard", "alpaca", {"instruction": "i", "output": "o"}),
        ("wizard", "sharegpt", {"conversations": turns("q", "a", "r", "b")}),
        ("vicuna", "sharegpt", {"conversations": turns("q", "a", "r", "b")}),
        ("sharegpt", "messages", {"messages": MESSAGES}),
        ("longform", "input-output", {"input": "i", "output": "o"}),
        ("oasst1", "text", {"text": "t"}),
    ],
)
def test_names_beside_those_that_are_found(write, name, like, values):
    path = write(values)
    assert read_records(path, name) == read_records(path) == [FORMATS[like].record(row(**values))]


def test_every_format_is_tried_above():
    assert {name for name, _, _ in FOUND} == {name for name, one in FORMATS.items() if one.detected}


def test_a_columns_order_and_a_later_row_do_not_matter(write):
    path = write({"output": "o", "instruction": "i"}, {"instruction": "j", "input": "n", "output": "p"})
    assert [r.input for r in read_records(path)] == ["", "n"]


# --- names in other letters, contexts, history -----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values", "record"),
    [
        ("alpaca", {"Instruction": "i", "Input": "n", "Output": "o"}, one("i", "n", "o")),
        ("alpaca", {"instruction": "i", " input": "n", " output ": "o"}, one("i", "n", "o")),
        ("alpaca", {"INSTRUCTION": "i", "output": "o"}, one("i", "", "o")),
        ("qa", {"Question": "q", "ANSWER": "a"}, one("q", "", "a")),
        ("sharegpt", {"Conversations": turns("q", "a", "r", "b")}, ROUNDS),
        ("alpaca", {"instruction": "i", "context": "c", "response": "o", "category": "x"}, one("i", "c", "o")),
        ("alpaca", {"instruction": "r", "output": "b", "history": [["q", "a"]]}, ROUNDS),
        ("alpaca", {"instruction": "i", "output": "o", "history": None, "tools": ""}, one("i", "", "o")),
    ],
)
def test_names_in_other_letters_and_dollys_and_history(write, name, values, record):
    path = write(values, values)
    found = detect_format(open_rows(path))
    assert (found.name, found.record(row(**values))) == (name, record)
    assert [again.rounds for again in read_records(path, name)] == [record.rounds] * 2
    assert pickle.loads(pickle.dumps(found)).record(row(**values)) == record


def test_an_optional_column_in_other_letters_may_be_missing_further_on(write):
    path = write({"Instruction": "i", "Input": "n", "Output": "o"}, {"Instruction": "j", "Output": "p"})
    assert [(r.instruction, r.input, r.output) for r in read_records(path)] == [("i", "n", "o"), ("j", "", "p")]
    with pytest.raises(InputError, match=r"row 2 .* lacks 'output': its keys are 'Instruction'"):
        read_records(write({"Instruction": "i", "Output": "o"}, {"Instruction": "j"}))


@pytest.mark.parametrize(
    ("values", "beside"),
    [
        ({"question": "q", "answer": "a", "Context": "c"}, "qa:instruction=question,input=Context,output=answer"),
        ({"question": "q", "answer": "a", "document": "c"}, "qa:instruction=question,input=document,"),
        ({"Text": "c", "Question": "q", "Answer": "a"}, "qa:instruction=Question,input=Text,output=Answer"),
        ({"instruction": "i", "inputs": "c", "output": "o"}, "alpaca:instruction=instruction,input=inputs,"),
        ({"prompt": "p", "completion": "c", "system": "s"}, "self-instruct:instruction=prompt,system=system,"),
        ({"input": "p", "output": "c", "system": "s"}, "input-output:instruction=input,system=system,"),
        ({"prompt": "p", "completion": "c", "input": "n"}, "self-instruct:instruction=prompt,input=input,output=comp"),
        ({"messages": MESSAGES, "tools": "[{}]"}, "messages:instruction=…"),
        ({"question": "q", "A": "a", "B": "b", "C": "c", "D": "d", "answer": "A"}, "qa:"),
    ],
)  # fmt: skip
def test_no_format_is_found_beside_a_context(write, values, beside):
    name, _, told = beside.partition(":")
    path = write(values)
    with pytest.raises(InputError, match=f"beside the columns of {name}, which would leave .*{re.escape(told)}"):
        read_records(path)
    assert read_records(path, name), "said by name it is taken"


def test_columns_passed_over_are_told():
    found = FORMATS["orca"].passed_over(["id", "question", "chosen", "rejected", "system"])
    assert found == ["id", "rejected"]
    assert FORMATS["alpaca"].passed_over(["instruction", "input", "context", "output"]) == ["context"]
    wrong = (("x", "'history' is text"), ([["q"]], "part 1 of 'history' is no pair"), ([[1, "a"]], "is the number 1"))
    for history, problem in wrong:
        with pytest.raises(RowError, match=problem):
            FORMATS["alpaca"].record(row(instruction="i", output="o", history=history))


# --- conversations ---------------------------------------------------------------------------------------


def test_an_answer_to_nothing_and_a_question_without_answer_are_dropped():
    spoken = [("system", "s"), ("assistant", "x"), ("user", "q"), ("assistant", "a"), ("user", "y")]
    assert conversation(row(), spoken) == SPOKEN
    assert conversation(row(), spoken[2:4]) == one("q", "", "a")


@pytest.mark.parametrize(
    ("spoken", "problem"),
    [
        ([("user", "q"), ("user", "r"), ("assistant", "a")], "turn 2 is the user's, expected the assistant's"),
        ([("system", "s"), ("assistant", "x"), ("assistant", "y")], "turn 3 is the assistant's, expected the user's"),
        ([("user", "q"), ("assistant", "a"), ("system", "s")], "turn 3 is the system's, expected the user's"),
        ([], "has 0 turns and no answer"),
        ([("system", "s")], "has 1 turns and no answer"),
        ([("assistant", "a")], "has 1 turns and no answer"),
        ([("user", "q")], "has 1 turns and no answer"),
    ],
)
def test_turns_that_make_no_conversation(spoken, problem):
    with pytest.raises(RowError, match=problem) as caught:
        conversation(row(), spoken)
    assert caught.value.reason.startswith(problem.split(",")[0])


def test_turns_as_they_stand_for_who_repairs_them():
    spoken = conversation_turns(row(items=turns("q", "r", "a", who=("human", "USER", "bard"))))
    assert spoken == [("user", "q"), ("user", "r"), ("assistant", "a")]


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values", "problem"),
    [
        ("alpaca", {"instruction": "i", "output": None}, "'output' is null, expected text"),
        ("alpaca", {"instruction": 7, "output": "o"}, "'instruction' is the number 7, expected text"),
        ("alpaca", {"instruction": "i", "input": 1.5, "output": "o"}, "'input' is the number 1.5"),
        ("alpaca", {"instruction": "i", "output": "o", "system": {}}, "'system' is an object"),
        ("alpaca", {"instruction": "i", "output": "a\udc00"}, "'output' has half a surrogate pair at character 1"),
        ("orca", {"question": "q"}, "lacks 'response': its keys are 'question'"),
        ("qa", {"A": "a"}, "lacks 'Q': its keys are 'A'"),
        ("hh-rlhf", {"chosen": turns("q", "a")}, "'chosen' is a list, expected text"),
        ("chip2", {"text": "<human>: q"}, "'text' has a question without an answer"),
        ("chip2", {"text": "<human>: q\n<human>: r\n<bot>: b"}, "'text' has a question without an answer"),
        ("self-instruct-seeds", {"instruction": "i", "instances": []}, "'instances' is 0 of them, expected a list of"),
        ("self-instruct-seeds", {"instruction": "i", "instances": "x"}, "'instances' is text, expected a list"),
        ("self-instruct-seeds", {"instruction": "i", "instances": [{}]}, "lacks 'output': its keys are none"),
        ("sharegpt", {"conversations": "x"}, "'conversations' is text, expected a list of turns"),
        ("sharegpt", {"conversations": ["x"]}, "turn 1 of 'conversations' is text, expected an object"),
        ("sharegpt", {"conversations": [{"value": "x"}]}, "turn 1 of 'conversations' is by None, expected from"),
        ("messages", {"messages": [{"role": "tool", "content": "x"}]}, "turn 1 of 'messages' is by 'tool'"),
        ("messages", {"messages": [{"role": "user", "content": None}]}, "turn 1 of 'messages' holds null"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "part 1 of turn 1 of 'messages' is 'image_url', expected type text"),
        ("messages", {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
         "turn 1 of 'messages' has 'tool_calls', expected text alone"),
        ("messages", {"messages": [{"role": "user", "content": "\ud800"}]}, "turn 1 of 'messages' has half a"),
        ("orca-dpo", {"input": "x", "preferred_output": MESSAGES[2:]}, "'input' is text, expected a list of turns"),
        ("orca-dpo", {"input": {"messages": MESSAGES[:2]}, "preferred_output": None}, "'preferred_output' is null"),
    ],
)  # fmt: skip
def test_a_row_that_does_not_fit(name, values, problem):
    with pytest.raises(RowError, match=re.escape(problem)) as caught:
        FORMATS[name].record(Row(3, "row 3 (line 4)", values))
    assert ", row 3 (line 4)" in str(caught.value)
    assert caught.value.reason.startswith(problem)
    assert "\n" not in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.reason) == (str(caught.value), caught.value.reason)


def test_a_named_format_that_the_file_has_not(write):
    """qlora#75: self-instruct wants prompt and completion, and the file is alpaca's."""
    path = write({"instruction": "i", "output": "o"})
    with pytest.raises(
        InputError, match="lacks 'prompt', which format self-instruct needs: its keys are 'instruction',"
    ) as e:
        read_records(path, "self-instruct")
    assert str(e.value).endswith("the format that fits is alpaca (--dataset_format alpaca)")
    with pytest.raises(InputError, match="no known format fits"):
        read_records(write({"x": 1}), "alpaca")
    with pytest.raises(InputError, match=r"dataset_format 'shargpt' is unknown: .*Did you mean 'sharegpt'\?"):
        read_records(path, "shargpt")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"turns": ["q"], "category": "x"}, r"holds prompts \('turns'\) and no answers .*: its keys are 'turns', 'cat"),
        ({"prompt": "p", "chosen": "c", "rejected": "r"},
         r"holds prompts \('prompt'\) and no .*--dataset_format self-instruct:prompt=prompt,completion=chosen, if"),
        (
            {"context": "c", "question": "q", "answer": "a"},
            "has 'context' beside the columns of qa, which would leave it out",
        ),
        ({"data": [{"instruction": "i", "output": "o"}]}, r"list of rows under 'data': .*jq -c '\.data\[\]' a\.jsonl"),
        ({"ID": "1", "Text": "t"}, r"lacks 'instruction': its keys .*--dataset_format alpaca:instruction=…,output=…"),
    ],
)
def test_columns_that_no_format_has(write, values, message):
    with pytest.raises(InputError, match=message):
        read_records(write(values))


def test_a_files_own_names(write):
    values = {"Text": "지문", "Question": "물음?", "Answer": "True"}
    path = write(values)
    found = read_records(path, "alpaca:instruction=Question, input = Text,output=Answer")
    assert found == [one("물음?", "지문", "True")]
    assert read_records(path, "qa:question=Question,answer=Answer") == [one("물음?", "", "True")]
    both = write({"Q": "no", "A": "a", "other": "yes"}, name="b.jsonl")
    assert read_records(both, "qa:question=other") == [one("yes", "", "a")]
    with pytest.raises(InputError, match="lacks 'Antwort', which format alpaca needs"):
        read_records(path, "alpaca:instruction=Question,output=Antwort")
    with pytest.raises(InputError, match="lacks 'Answer': its keys are 'Question'"):
        read_records(write(values, {"Question": "q"}), "alpaca:instruction=Question,output=Answer")
    for mapping in ("answer=Answer", "instruction", "instruction=", "=x"):
        with pytest.raises(InputError, match="expected COLUMN=NAME with a column among instruction, input, context,"):
            read_records(path, f"alpaca:{mapping}")


def test_a_folder_of_one_format_and_of_two(tmp_path, write):
    write({"instruction": "i", "output": "o"}, name="a.jsonl")
    write({"instruction": "i", "output": "o", "url": "u"}, name="b.json")
    # Each alone would be found as another; alpaca fits both.
    assert detect_format(open_rows(tmp_path)).name == "alpaca"
    assert [r.row for r in read_records(tmp_path)] == [1, 1]
    write({"conversations": turns("q", "a")}, name="c.json")
    with pytest.raises(InputError, match=r"a\.jsonl is alpaca and .*c\.json is sharegpt: expected files of one format"):
        read_records(tmp_path)
    write({"x": "y"}, name="d.json")
    with pytest.raises(InputError, match=r"d\.json, row 1 \(line 1\) lacks 'instruction': its keys are 'x'"):
        read_records(tmp_path)


def test_qloras_names():
    names = ["alpaca", "alpaca-clean", "chip2", "self-instruct", "hh-rlhf", "longform", "oasst1"]
    for name in names:
        repo, format_name = named_dataset(name)
        assert re.fullmatch(r"[\w-]+/[\w-]+", repo)
        assert format_name in FORMATS
    assert len({named_dataset(name)[0] for name in names}) == len(names)
    assert named_dataset("my.json") is None
    with pytest.raises(InputError, match="vicuna was never released: give a file"):
        named_dataset("vicuna")


# --- real files and the table ----------------------------------------------------------------------------


def test_real_files_are_found(assets):
    found = {
        "en/fastchat_dummy_conversation.json": "sharegpt",
        "en/mmlu/zero_shot_mmlu_val.json": "input-output",
        "en/orca_dpo_pairs_validation.jsonl": "orca-dpo",
        "en/qlora_oa_questions.jsonl": "input-output",
        "en/self_instruct_seed_tasks.jsonl": "self-instruct-seeds",
        "ko/ChatbotData.csv": "qa",
        "ko/ko_sharegpt_deepl_translate_cleaned_v2.json": "alpaca",
    }
    for name, format_name in found.items():
        source = open_rows(assets / "data" / name)
        chosen = detect_format(source)
        assert chosen.name == format_name
        assert all(chosen.record(one).rounds for one in source)
    with pytest.raises(InputError, match=r"holds prompts \('turns'\)"):
        read_records(assets / "data/en/mt_bench_question.jsonl")
    for path in (assets / "data/ko/kobest").glob("*.tsv"):  # questions to choose from, in columns of their own
        with pytest.raises(InputError, match=r"its keys are .*--dataset_format \w+:"):
            read_records(path)
    boolq = read_records(
        assets / "data/ko/kobest/BoolQ.dev.tsv", "alpaca:instruction=Question,input=Text,output=Answer"
    )
    assert len(boolq) == 700
    assert {r.output for r in boolq} == {"True", "False"}


def test_real_conversations_become_their_rounds(assets):
    path = assets / "data/en/fastchat_dummy_conversation.json"
    for raw, record in zip(json.loads(path.read_text("utf-8")), read_records(path), strict=True):
        said = [turn["value"] for turn in raw["conversations"]]
        assert said == [text for one in record.rounds for text in (one.instruction, one.output)]


def test_the_documented_table_is_the_formats(repo_root):
    text = (repo_root / "docs/data.md").read_text("utf-8")
    table = [
        line.strip("| ").split(" | ") for line in text.split("## Formats")[1].splitlines() if line.startswith("| `")
    ]
    assert table == [
        [f"`{one.name}`", ", ".join(f"`{c}`" for c in one.columns).replace("|", "` or `"),
         one.becomes + ("" if one.detected else " (by name)")]
        for one in FORMATS.values()
    ]  # fmt: skip
