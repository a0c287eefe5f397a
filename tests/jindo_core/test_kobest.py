"""KoBEST against lm-evaluation-harness itself, on the same weights: every figure to the last digit.

The harness' own task definitions run on rows that pandas reads from the published files, and on transformers' model;
for LLaMA's tokenizer.model it gets the sentencepiece package, since transformers converts that unfaithfully.
"""

from __future__ import annotations

from pathlib import Path

import lm_eval
import pandas
import pytest
import torch
from datasets import Dataset
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as Vocabulary
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from jindo_core import kobest
from jindo_core.errors import InputError
from jindo_core.eval_config import KOBEST, EvalConfig
from jindo_core.evaluation import KobestRun
from jindo_core.likelihood import Score
from jindo_core.loader import load_model
from jindo_core.tokenizer import load_tokenizer

DEFINITIONS = Path(lm_eval.__file__).parent / "tasks" / "kobest"
# {task: (file, {its column: the Hub's}, what is taken from its label, true or false)}
PUBLISHED = {
    "kobest_boolq": ("BoolQ", {"Text": "paragraph", "Question": "question", "Answer": "label"}, 0),
    "kobest_copa": (
        "COPA", {"sentence": "premise", "1": "alternative_1", "2": "alternative_2", "Answer": "label"}, 1,
    ),
    "kobest_hellaswag": ("HellaSwag", {f"choice{i}": f"ending_{i}" for i in range(1, 5)}, 0),
    "kobest_sentineg": ("SentiNeg", {"Text": "sentence", "Label": "label"}, 0),
    "kobest_wic": (
        "WiC", {"Target": "word", "SENTENCE1": "context_1", "SENTENCE2": "context_2", "ANSWER": "label"}, 0,
    ),
}  # fmt: skip


class SentencePieceLM(HFLM):
    """The harness' model with a tokenizer.model's own ids."""

    processor: SentencePieceProcessor

    def tok_encode(self, string, add_special_tokens=None, left_truncate_len=None, **kwargs):
        return [self.processor.bos_id(), *self.processor.encode(string)]


def harness_results(lm, folder, limit, split="test"):
    tasks, group = {}, Group.from_config(load_yaml(DEFINITIONS / "_kobest.yaml"))
    for name, (file, columns, less) in PUBLISHED.items():
        rows = pandas.read_csv(folder / f"{file}.{split}.tsv", sep="\t").rename(columns=columns)
        rows["label"] = rows["label"].astype(int) - less
        config = load_yaml(DEFINITIONS / f"{name}.yaml")
        for metric in config["metric_list"]:
            metric.pop("hf_evaluate", None)  # would fetch a function that multiple choice never calls
        config |= {"training_split": None, "validation_split": None, "num_fewshot": 0, "metadata": {}}
        config["custom_dataset"] = lambda rows=rows, **_: {"test": Dataset.from_pandas(rows)}
        tasks[name] = ConfigurableTask(config=config)
        group.add(tasks[name])
    return evaluate(lm, {"tasks": tasks, "groups": {"kobest": group}}, limit=limit, bootstrap_iters=1)


def ours(model, tokenizer, folder, limit, batch_size):
    figures, predictions = {}, {}
    config = EvalConfig(tasks=("kobest",), data_path=(str(folder),), limit=limit, batch_size=batch_size)
    for name in KOBEST:
        run = KobestRun(name, str(folder), tokenizer, config)
        figures[name], predictions[name] = run.measure(model, lambda work, one: map(one, work))
    figures["kobest"] = kobest.group([figures[name] for name in KOBEST])
    return figures, predictions


def check(theirs, figures, predictions):
    for name in (*KOBEST, "kobest"):
        wanted = theirs["results" if name in theirs["results"] else "groups"][name]
        told = {key.removesuffix(",none"): value for key, value in wanted.items() if key.endswith(",none")}
        told = {key: value for key, value in told.items() if isinstance(value, float)}  # f1 has no standard error
        assert {"acc", "acc_stderr", "f1"} <= told.keys()
        assert {key: value for key, value in figures[name].items() if key in told} == told, name
    for name, rows in predictions.items():
        samples = theirs["samples"][name]
        assert [row["context"] for row in rows] == [sample["arguments"][0][0] for sample in samples]
        assert [row["label"] for row in rows] == [sample["f1"][0] for sample in samples]
        assert [row["choice"] for row in rows] == [sample["f1"][1] for sample in samples]
        for row, sample in zip(rows, samples, strict=True):
            logs = [response[0] for response in sample["filtered_resps"]]
            assert row["log_probabilities"] == pytest.approx(logs, rel=2e-5, abs=2e-4)  # fp32 sums


def harness_model(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    names = Vocabulary(WordLevel({name: i for i, name in enumerate(special.values())}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=names, **special)  # for its special ids; it encodes nothing
    lm = SentencePieceLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu")
    lm.processor = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return lm


def test_every_figure_is_the_harness_own(stories260k, assets):
    folder = assets / "data/ko/kobest"
    model = load_model(stories260k, quantize=None, dtype="fp32", device="cpu")
    figures, predictions = ours(model, load_tokenizer(stories260k), folder, 5, 8)
    assert figures["kobest_boolq"]["cut"] > 0  # 512 tokens of context: what is too long loses its beginning
    check(harness_results(harness_model(stories260k), folder, 5), figures, predictions)


@pytest.mark.slow
def test_a_larger_model_is_the_harness_own(stories15m, assets):
    folder = assets / "data/ko/kobest"
    model = load_model(stories15m, quantize=None, dtype="fp32", device="cpu")
    figures, predictions = ours(model, load_tokenizer(stories15m), folder, 25, 16)
    check(harness_results(harness_model(stories15m), folder, 25), figures, predictions)


@pytest.mark.slow
def test_smollm2_is_the_harness_own_with_its_own_tokenizer(smollm2_gguf, assets):
    """Another tokenizer, whose text has no BOS, and a model that transformers reads from the same GGUF file."""
    folder = assets / "data/ko/kobest"
    model = load_model(smollm2_gguf, quantize=None, dtype="fp32", device="cpu")
    figures, predictions = ours(model, load_tokenizer(smollm2_gguf), folder, 8, 8)
    where = {"pretrained_model_name_or_path": str(smollm2_gguf.parent), "gguf_file": smollm2_gguf.name}
    theirs = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(**where), batch_size=4, device="cpu",
    )  # fmt: skip
    check(harness_results(theirs, folder, 8), figures, predictions)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def questions(task, path, limit=None):
    return kobest.read_questions(kobest.TASKS[task], kobest.find_source(kobest.TASKS[task], path, "test"), limit)


def test_the_hub_columns_are_read_too(tmp_path):
    text = "ID\tsentence\tquestion\t1\t2\tAnswer\n1\t비가 왔다.\t결과\t젖었다.\t말랐다.\t2\n"
    tsv = write(tmp_path / "COPA.test.tsv", text)
    row = '{"premise": "비가 왔다.", "question": "결과", "alternative_1": "젖었다.", "alternative_2": "말랐다.", '
    row += '"label": 1}'
    on_hub = write(tmp_path / "hub.jsonl", row + "\n")
    asked = questions("kobest_copa", tmp_path)
    assert asked == questions("kobest_copa", tsv) == questions("kobest_copa", on_hub)
    assert asked == [kobest.Question(1, "비가 왔다.  그래서", ("젖었다.", "말랐다."), 1)]


def test_the_hub_folders_of_parquet_are_read(tmp_path):
    (tmp_path / "boolq").mkdir()
    rows = pandas.DataFrame({"paragraph": ["하늘은 파랗다."], "question": ["하늘은 붉은가?"], "label": [0]})
    rows.to_parquet(tmp_path / "boolq" / "test-00000-of-00001.parquet")
    (asked,) = questions("kobest_boolq", tmp_path)
    assert asked == kobest.Question(1, "하늘은 파랗다. 질문: 하늘은 붉은가? 답변: ", ("아니오", "예"), 0)


def test_equal_choices_have_the_first_as_gold_as_in_the_harness(tmp_path):
    path = write(tmp_path / "c.tsv", "sentence\tquestion\t1\t2\tAnswer\n비가 왔다.\t원인\t같다.\t같다.\t2\n")
    assert questions("kobest_copa", path)[0].gold == 0


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("kobest_copa", "sentence\tquestion\t1\t2\tAnswer\nㄱ\t왜\tㄴ\tㄷ\t1\n", "got the question '왜'"),
        ("kobest_copa", "sentence\tquestion\t1\t2\tAnswer\nㄱ\t원인\tㄴ\tㄷ\t3\n", "got the label '3', expected 1 or"),
        ("kobest_boolq", "Text\tQuestion\tAnswer\nㄱ\tㄴ\tmaybe\n", "got the label 'maybe', expected false or true"),
        ("kobest_boolq", "Text\tQuestion\nㄱ\tㄴ\n", "no value in Answer or label (it has Text, Question)"),
        ("kobest_sentineg", "Text\tLabel\n\t1\n", "no value in Text or sentence"),
        ("kobest_hellaswag", "context\tlabel\nㄱ\t1\n", "no value in choice1 or ending_1"),
    ],
)
def test_a_row_of_another_kind_is_named(tmp_path, task, text, message):
    with pytest.raises(InputError, match=r"row 1 \(line 2\)") as raised:
        questions(task, write(tmp_path / "x.tsv", text))
    assert message in str(raised.value)


def test_a_folder_without_the_split_says_what_it_lacks(tmp_path):
    with pytest.raises(InputError, match=r"holds no WiC\.test\.tsv, which kobest_wic asks"):
        questions("kobest_wic", tmp_path)


def test_the_dev_split_is_read_from_its_own_file(assets):
    task = kobest.TASKS["kobest_sentineg"]
    source = kobest.find_source(task, assets / "data/ko/kobest", "dev")
    assert [path.name for path in source.paths] == ["SentiNeg.dev.tsv"]
    assert len(kobest.read_questions(task, source)) == 400


def test_ties_go_to_the_first_and_lengths_count_characters():
    question = kobest.Question(1, "x", ("가나다라", "가"), 1)
    scores = [Score(-2.0, False), Score(-2.0, False)]
    assert kobest.answer(question, scores) == kobest.Answer(gold=1, choice=0, choice_norm=0)
    assert kobest.answer(question, [Score(-2.0, False), Score(-1.0, False)]).choice_norm == 0


def test_one_row_has_no_standard_error():
    figures = kobest.measures(kobest.TASKS["kobest_wic"], [kobest.Answer(0, 0, 0)])
    assert figures == {"acc": 1.0, "f1": 1.0, "n": 1}
    assert kobest.group([figures]) == {"acc": 1.0, "n_acc": 1, "f1": 1.0, "n_f1": 1, "n": 1}


def test_macro_f1_is_over_labels_of_either_column():
    assert kobest.macro_f1([0, 0, 1], [0, 2, 1]) == pytest.approx((2 / 3 + 1 + 0) / 3)
