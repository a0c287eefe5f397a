"""qlora.py's own command lines, verbatim but for the first two words, and what is said about each flag."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from jindo_core.cli.flags import parse_flags
from jindo_core.cli.main import main
from jindo_core.config import TrainConfig, accepted, resolve_train_config, settings
from jindo_core.errors import InputError
from jindo_core.qlora import FLAGS, OTHER_VALUES

# scripts/finetune_guanaco_7b.sh; the others differ in the places named below.
GUANACO_7B = r"""
python qlora.py \
    --model_name_or_path huggyllama/llama-7b \
    --output_dir ./output/guanaco-7b \
    --logging_steps 10 \
    --save_strategy steps \
    --data_seed 42 \
    --save_steps 500 \
    --save_total_limit 40 \
    --evaluation_strategy steps \
    --eval_dataset_size 1024 \
    --max_eval_samples 1000 \
    --per_device_eval_batch_size 1 \
    --max_new_tokens 32 \
    --dataloader_num_workers 3 \
    --group_by_length \
    --logging_strategy steps \
    --remove_unused_columns False \
    --do_train \
    --do_eval \
    --do_mmlu_eval \
    --lora_r 64 \
    --lora_alpha 16 \
    --lora_modules all \
    --double_quant \
    --quant_type nf4 \
    --bf16 \
    --bits 4 \
    --warmup_ratio 0.03 \
    --lr_scheduler_type constant \
    --gradient_checkpointing \
    --dataset oasst1 \
    --source_max_len 16 \
    --target_max_len 512 \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 16 \
    --max_steps 1875 \
    --eval_steps 187 \
    --learning_rate 0.0002 \
    --adam_beta2 0.999 \
    --max_grad_norm 0.3 \
    --lora_dropout 0.1 \
    --weight_decay 0.0 \
    --seed 0
"""
BIGGER = {"7b": "13b", "lora_dropout 0.1": "lora_dropout 0.05"}
BIGGEST = {**BIGGER, "save_steps 500": "save_steps 200", "learning_rate 0.0002": "learning_rate 0.0001"}
GUANACO = {
    "7b": {},
    "13b": BIGGER,
    "33b": {"llama-7b": "llama-30b", **BIGGEST, "7b": "33b"},
    "65b": {**BIGGEST, "7b": "65b"},
}
# scripts/finetune.sh, which ends in a backslash.
FINETUNE = (
    r"""
python qlora.py \
    --model_name_or_path EleutherAI/pythia-12b \
    --output_dir ./output \
    --dataset alpaca \
    --do_train True \
    --do_eval True \
    --do_mmlu_eval True \
    --source_max_len 384 \
    --target_max_len 128 \
    --per_device_train_batch_size 4 \
    --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps 4 \
    --logging_steps 10 \
    --max_steps 10000 \
    --save_strategy steps \
    --data_seed 42 \
    --save_steps 1000 \
    --save_total_limit 40 \
    --evaluation_strategy steps \
    --eval_dataset_size 1024 \
    --max_eval_samples 1000 \
    --eval_steps 1000 \
    --optim paged_adamw_32bit """
    + "\\\n"
)
LLAMA2 = GUANACO_7B.replace("huggyllama/llama-7b", "meta-llama/Llama-2-7b-hf").replace(
    "    --output_dir", "    --use_auth \\\n    --output_dir"
)
README = "python qlora.py --model_name_or_path huggyllama/llama-7b"


def resolved(command):
    """(the config, the notices) of a command line."""
    given = parse_flags(TrainConfig, shlex.split(command.replace("\\\n", " "))[2:])
    config, _, notices = resolve_train_config(given)
    return config, notices


def values(config, *names):
    return tuple(getattr(config, name) for name in names)


def message(command):
    with pytest.raises(InputError) as caught:
        resolved(f"{README} {command}")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Whole command lines --------------------------------------------------------------------------------------


def test_the_readmes_first_command_is_qloras_defaults():
    config, notices = resolved(README)
    assert values(config, "profile", "base_model", "data_path", "output_dir") == (
        "qlora", "huggyllama/llama-7b", ("alpaca",), "./output",
    )  # fmt: skip
    assert values(config, "source_max_len", "target_max_len", "cutoff_len") == (1024, 256, 1280)
    assert values(config, "quantize", "double_quant", "optim", "gradient_checkpointing") == (
        "nf4", True, "paged_adamw_32bit", True,
    )  # fmt: skip
    assert values(config, "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules") == (
        64, 16.0, 0.0, ("all-linear",),
    )  # fmt: skip
    assert values(config, "micro_batch_size", "accumulation_steps", "max_steps") == (1, 16, 10000)
    assert values(config, "learning_rate", "lr_scheduler_type", "max_grad_norm", "weight_decay") == (
        2e-4, "constant", 0.3, 0.0,
    )  # fmt: skip
    assert values(config, "train_on_inputs", "group_by_length", "val_set_size", "max_memory_MB") == (
        False, True, 0, 80000,
    )  # fmt: skip
    assert values(config, "logging_steps", "do_mmlu_eval", "warmup_ratio") == (10, False, 0.0)
    assert config.warmup(10000) == 0
    assert notices == ("no --dataset: alpaca is used, as in qlora.py",)


@pytest.mark.parametrize("size", GUANACO)
def test_the_guanaco_scripts(size):
    command = GUANACO_7B
    for old, new in GUANACO[size].items():
        assert old in command
        command = command.replace(old, new)
    config, notices = resolved(command)
    model = {"33b": "30b"}.get(size, size)
    assert values(config, "base_model", "output_dir") == (f"huggyllama/llama-{model}", f"./output/guanaco-{size}")
    assert values(config, "data_path", "source_max_len", "target_max_len") == (("oasst1",), 16, 512)
    assert values(config, "val_set_size", "max_eval_samples", "eval_steps", "do_mmlu_eval") == (1024, 1000, 187, True)
    assert values(config, "micro_batch_size", "batch_size", "max_steps", "seed") == (1, 16, 1875, 0)
    assert values(config, "quantize", "dtype", "lora_target_modules") == ("nf4", "bf16", ("all-linear",))
    assert config.learning_rate == (2e-4 if size in ("7b", "13b") else 1e-4)
    assert config.lora_dropout == (0.1 if size == "7b" else 0.05)
    text = "\n".join(notices)
    silent = set(re.findall(r"--(\w+)", command)) - set(re.findall(r"--(\w+)", text))
    # What is not spoken of is a setting here, or asks for what is done anyway.
    assert silent <= settings(TrainConfig).keys() | {
        "model_name_or_path", "dataset", "per_device_train_batch_size", "gradient_accumulation_steps", "bits", "bf16",
        "quant_type", "lora_modules", "save_strategy", "evaluation_strategy", "eval_dataset_size", "do_eval",
        "do_train", "adam_beta2",
    }  # fmt: skip
    assert values(config, "save_steps", "save_total_limit") == (200 if size in ("33b", "65b") else 500, 40)
    assert "--warmup_ratio: no effect with a constant schedule" in text


def test_finetune_sh():
    config, notices = resolved(FINETUNE)
    assert values(config, "base_model", "data_path", "batch_size", "micro_batch_size") == (
        "EleutherAI/pythia-12b", ("alpaca",), 16, 4,
    )  # fmt: skip
    assert values(config, "source_max_len", "target_max_len", "val_set_size", "eval_steps") == (384, 128, 1024, 1000)
    assert any("--per_device_eval_batch_size" in notice for notice in notices)


def test_llama_2s_script_asks_for_the_hubs_login():
    config, notices = resolved(LLAMA2.rstrip() + " \\\n    --cache_dir /somewhere \n")
    assert config.base_model == "meta-llama/Llama-2-7b-hf"
    assert any(notice.startswith("--use_auth: the Hub's own login counts") for notice in notices)
    assert any(notice.startswith("--cache_dir: ") for notice in notices)


@pytest.mark.parametrize("more", ["", " --dataset_format self-instruct"])
def test_a_file_of_ones_own(more):
    config, notices = resolved(f"{README} --dataset rows.jsonl{more}")
    assert values(config, "data_path", "val_set_size") == (("rows.jsonl",), 0)
    assert config.dataset_format == ("self-instruct" if more else None)
    assert notices == ()


def test_main_prints_the_notices_before_anything_is_read(tmp_path, capsys):
    argv = ["train", "--model_name_or_path", str(tmp_path / "none"), "--dataset", "x.json", "--adam8bit", "--bits=8"]
    assert main([*argv, "--output_dir", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert "--adam8bit: qlora.py never reads it" in " ".join(out.split())
    assert "--bits 8: 8-bit weights are served by NF4" in " ".join(out.split())
    assert err.startswith("error: ")


def test_plan_takes_them_too(tmp_path, capsys):
    given = ["--shape", "llama2-7b", "--bits", "8", "--source_max_len", "384", "--target_max_len=128", "--json"]
    assert main(["plan", *given, "--per_device_train_batch_size", "2", "--profile", "qlora"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["peak_bytes"] > 0
    assert "note: --bits 8: 8-bit weights are served by NF4" in err


def test_the_guanaco_script_runs(stories15m, tmp_path, monkeypatch, capsys):
    """Only what it reads and how long it runs is put in place of its own."""
    monkeypatch.setenv("JINDO_TOKENIZED", str(tmp_path / "cache"))
    rows = [{"prompt": f"Say {i}.", "completion": f"It is {i}!"} for i in range(24)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    question = {"subject": "birds", "input": "Which one flies?\nA. a\nB. b\nC. c\nD. d\nAnswer:", "output": "B"}
    (tmp_path / "five_shot_mmlu_val.json").write_text(json.dumps(question))
    command = GUANACO_7B
    for old, new in {
        "huggyllama/llama-7b": str(stories15m), "./output/guanaco-7b": str(tmp_path / "out"), "1875": "2",
        "eval_dataset_size 1024": "eval_dataset_size 4", "target_max_len 512": "target_max_len 64",
        "oasst1": f"{tmp_path}/rows.json --dataset_format self-instruct --mmlu_path {tmp_path}",
    }.items():  # fmt: skip
        assert old in command
        command = command.replace(old, new)
    assert main(["train", *shlex.split(command.replace("\\\n", " "))[2:]]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2]
    assert [line["step"] for line in lines if "mmlu_eval_accuracy_birds" in line] == [0, 2]
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (64, 16)
    kinds = {name.rpartition(".")[2] for name in adapter["target_modules"]}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert capsys.readouterr().out.startswith("note: --data_seed: one seed serves")


# Flags one by one -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected", "said"),
    [
        ("--bits 16", {"quantize": "none"}, ""),
        ("--bits 32", {"quantize": "none", "dtype": "fp32"}, ""),
        ("--bits 32 --bf16", {"quantize": "none", "dtype": "bf16"}, ""),
        ("--save_strategy no", {"save_steps": 0}, ""),
        ("--save_strategy no --save_steps 9", {"save_steps": 0}, "--save_steps: no effect with --save_strategy no"),
        ("--save_strategy steps --save_steps 9", {"save_steps": 9}, ""),
        ("--resume_from_checkpoint out/checkpoint-5", {"resume_from_checkpoint": "out/checkpoint-5"}, ""),
        ("--resume_from_checkpoint true", {"resume_from_checkpoint": "True"}, ""),
        ("--resume_from_checkpoint False", {"resume_from_checkpoint": None}, ""),
        ("--bits 8", {"quantize": "nf4"}, "--bits 8: 8-bit weights are served by NF4"),
        ("--quant_type fp4", {"quantize": "nf4"}, "--quant_type fp4: FP4 is served by NF4"),
        ("--quant_type nf4 --double_quant False", {"double_quant": False}, ""),
        ("--bf16", {"dtype": "bf16"}, ""),
        ("--bf16 False --fp16 False", {"dtype": "auto"}, ""),
        ("--fp16", {"dtype": "auto"}, "--fp16: no fp16, in which gradients overflow"),
        ("--train_on_source", {"train_on_inputs": True}, ""),
        ("--no_train_on_source", {"train_on_inputs": False}, ""),
        ("--per_device_train_batch_size 4", {"micro_batch_size": 4, "batch_size": 64}, ""),
        ("--gradient_accumulation_steps 2", {"micro_batch_size": 1, "batch_size": 2}, ""),
        ("--micro_batch_size 2 --gradient_accumulation_steps 3", {"micro_batch_size": 2, "batch_size": 6}, ""),
        ("--per_device_train_batch_size 2 --batch_size 4", {"micro_batch_size": 2, "batch_size": 4}, ""),
        ("--do_eval", {"val_set_size": 1024}, ""),
        ("--do_eval --eval_dataset_size 50", {"val_set_size": 50}, ""),
        ("--do_eval --val_set_size 7", {"val_set_size": 7}, ""),
        ("--do_eval False --eval_dataset_size 50", {"val_set_size": 0}, "--eval_dataset_size: qlora.py holds rows"),
        ("--evaluation_strategy steps", {"val_set_size": 1024, "eval_steps": 10}, ""),
        ("--eval_strategy steps --logging_steps 3", {"val_set_size": 1024, "eval_steps": 3}, ""),
        ("--evaluation_strategy no", {"val_set_size": 0}, ""),
        ("--lora_modules q_proj,v_proj", {"lora_target_modules": ("q_proj", "v_proj")}, ""),
        ("--optim adamw_bnb_8bit", {"optim": "paged_adamw_8bit"}, "--optim adamw_bnb_8bit: served by paged_adamw_8bit"),
        ("--optim paged_adamw_8bit", {"optim": "paged_adamw_8bit"}, ""),
        ("--adam8bit", {"optim": "paged_adamw_32bit"}, "--adam8bit: qlora.py never reads it"),
        ("--adam8bit False", {"optim": "paged_adamw_32bit"}, ""),
        ("--no_adam8bit --full_finetune 0 --no-do-predict", {"optim": "paged_adamw_32bit"}, ""),
        ("--warmup_ratio 0", {"warmup_ratio": 0.0}, ""),
        ("--warmup_steps 5", {"warmup_steps": 0}, "--warmup_steps: no effect with a constant schedule"),
        ("--lr_scheduler_type linear", {"lr_scheduler_type": "linear", "warmup_ratio": 0.03}, ""),
        ("--lr_scheduler_type cosine --warmup_ratio .1", {"lr_scheduler_type": "cosine", "warmup_ratio": 0.1}, ""),
        (
            "--lr_scheduler_type constant_with_warmup --warmup_ratio 0.05",
            {"lr_scheduler_type": "constant", "warmup_ratio": 0.05},
            "",
        ),
        (
            "--lr_scheduler_type linear --warmup_steps 7 --warmup_ratio 0.05",
            {"warmup_steps": 7, "warmup_ratio": 0.0},
            "--warmup_ratio: no effect beside --warmup_steps",
        ),
        ("--num_train_epochs 2", {"num_epochs": 2.0, "max_steps": -1}, "--num_train_epochs: counts; qlora.py would"),
        ("--save_strategy epoch", {"save_epochs": True}, ""),
        ("--save_strategy epoch --save_steps 9", {"save_epochs": True}, "--save_steps: no effect with --save_epochs"),
        ("--save_strategy steps", {"save_epochs": False, "save_steps": 250}, ""),
        ("--evaluation_strategy epoch", {"eval_epochs": True, "val_set_size": 1024}, ""),
        ("--eval_strategy epoch --eval_steps 5", {"eval_epochs": True}, "--eval_steps: no effect with --eval_epochs"),
        ("--num_train_epochs 2 --max_steps 9", {"num_epochs": 2.0, "max_steps": 9}, ""),
        ("--max_memory_MB 5400", {"max_memory_MB": 5400}, ""),
        ("--cutoff_len 512", {"cutoff_len": 512, "source_max_len": None, "target_max_len": None}, ""),
        ("--source_max_len 64", {"source_max_len": 64, "target_max_len": 256, "cutoff_len": 320}, ""),
        ("--cutoff_len 9 --source_max_len 64", {"cutoff_len": 320}, "--cutoff_len: no effect beside --source_max_len"),
        ("--packing", {"packing": True, "cutoff_len": 1280}, ""),
        ("--packing --group_by_length", {"packing": True}, "--group_by_length: no effect with --packing"),
        ("--max_eval_samples 5", {"max_eval_samples": 5}, "--max_eval_samples: no effect: no row is held out"),
        ("--max_mmlu_samples 5", {"max_mmlu_samples": 5}, "--max_mmlu_samples: no effect without --do_mmlu_eval"),
        ("--do_mmlu_eval --mmlu_dataset mmlu-zs --mmlu_split test", {"mmlu_dataset": "mmlu-zs"}, ""),
        ("--report_to none --local_rank -1 --deepspeed ''", {}, ""),
        ("--report_to wandb tensorboard --seed 3", {"seed": 3, "report_to": ("wandb", "tensorboard")}, ""),
        ("--report_to none --run_name r --logging_dir d", {"wandb_run_name": "r", "logging_dir": "d"}, ""),
        ("--top_k 1 --temperature 0.7", {}, "--top_k, --temperature: no effect without --do_predict"),
        ("--do_predict", {"predict_with_generate": True, "val_set_size": 1024, "max_new_tokens": 256}, ""),
        ("--do_predict --predict_with_generate --eval_dataset_size 9", {"val_set_size": 9, "do_sample": False}, ""),
        ("--do_predict False --predict_with_generate", {"predict_with_generate": False}, "--predict_with_generate: no"),
        ("--do_predict --predict_with_generate False", {"predict_with_generate": False}, "--do_predict: nothing is"),
        ("--predict_with_generate", {"val_set_size": 0}, "--predict_with_generate: no effect: no row is held out"),
        ("--do_predict --top_p 0.9", {"top_p": 0.9}, "--top_p: no effect without --do_sample"),
        ("--do_predict --do_sample --top_p 0.9 --top_k 0 --temperature 0.7", {"top_p": 0.9, "top_k": 0}, ""),
        ("--do_predict --num_beams 1 --repetition_penalty 1.0 --use_cache True", {"top_k": 50, "temperature": 1.0}, ""),
        ("--do_predict --num_beams 4", {}, "--num_beams: answers are greedy, or sampled as --temperature"),
        ("--adam_beta1 0.9 --adam_epsilon 1e-8 --do_train True --full_finetune False", {}, ""),
    ],
)
def test_what_becomes_of_a_flag(flags, expected, said):
    config, notices = resolved(f"{README} --dataset d {flags}")
    assert {name: getattr(config, name) for name in expected} == expected
    assert ("\n".join(notices).startswith(said) and len(notices) == 1) if said else notices == ()


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--bits 3", "--bits: got 3, expected 4, or 16"),
        ("--bits four", "--bits: got 'four', expected a whole number"),
        ("--quant_type int4", "--quant_type: got 'int4', expected nf4, or fp4"),
        ("--full_finetune", "--full_finetune: only adapters are trained"),
        ("--adam_beta2 0.95", "--adam_beta2: AdamW runs with betas 0.9 and 0.999"),
        ("--no_do_train", "--do_train: training is what this command does"),
        ("--do_train False", "--do_train: training is what this command does"),
        ("--do_predict --top_k -1", "--top_k: got '-1', expected a whole number of at least 0"),
        ("--do_predict --temperature hot", "--temperature: got 'hot', expected a number"),
        ("--save_strategy best", "--save_strategy: got 'best', expected steps (--save_steps says how many), epoch or"),
        ("--save_strategy no --save_epochs", "--save_strategy: got it beside --save_epochs"),
        ("--resume --resume_from_checkpoint c", "--resume: got it beside --resume_from_checkpoint"),
        ("--deepspeed z.json", "--deepspeed: several GPUs are torchrun's and --fsdp's here"),
        ("--bf16 --fp16", "--fp16: got it beside --bf16"),
        ("--evaluation_strategy best", "--evaluation_strategy: got 'best', expected steps, epoch or no"),
        ("--per_device_train_batch_size 0", "--per_device_train_batch_size: got '0', expected a whole number"),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps: got '0', expected a whole number"),
        ("--gradient_accumulation_steps 2 --batch_size 5", "--gradient_accumulation_steps: got it beside --batch_size"),
        ("--train_on_source --no_train_on_inputs", "--train_on_source: got it beside --train_on_inputs, which says"),
        ("--base_model m", "--model_name_or_path: got it beside --base_model; one is qlora.py's name"),
        ("--data_path m", "--model_name_or_path: got it beside --data_path; one is qlora.py's name"),
        ("--base_model m --profile qlora", "--model_name_or_path: got it beside --base_model, which says the same"),
        ("--optim lion", "--optim: got 'lion', expected one of paged_adamw_32bit"),
        ("--lr_scheduler_type polynomial", "--lr_scheduler_type: got 'polynomial', expected one of linear"),
        ("--warmup_ratio 1", "--warmup_ratio: got '1', expected a number of at least 0 and below 1"),
        ("--source_max_length 3", "Did you mean '--source_max_len'?"),
        ("--gradient_accumulation_step 3", "Did you mean '--gradient_accumulation_steps'?"),
    ],
)
def test_what_is_refused(flags, part):
    assert part in message(flags)


def test_a_profile_decides_where_names_are_mixed():
    config, _ = resolved("jindo-core train --base_model m --dataset d --profile qlora")
    assert values(config, "base_model", "data_path", "lora_r") == ("m", ("d",), 64)
    config, _ = resolved("jindo-core train --model_name_or_path m --data_path d --profile alpaca")
    assert values(config, "base_model", "data_path", "lora_r") == ("m", ("d",), 8)


def test_qloras_other_flags_leave_alpaca_loras_defaults():
    config, notices = resolved("jindo-core train --base_model m --per_device_train_batch_size 2 --warmup_ratio 0.05")
    assert values(config, "profile", "micro_batch_size", "batch_size", "lora_r") == ("alpaca", 2, 128, 8)
    assert config.warmup(1000) == 50
    assert notices == ()


def test_alpaca_loras_other_flags():
    rest = "--wandb_project '' --resume_from_checkpoint None --add_eos_token"
    _, notices = resolved(f"jindo-core train --base_model m {rest}")
    assert notices == ("--add_eos_token: EOS is learnt wherever the answer fits, as alpaca-lora does without it too",)
    reported = "--wandb_project p --wandb_run_name r --wandb_watch all --wandb_log_model true"
    config, notices = resolved(f"jindo-core train --base_model m {reported}")
    names = ("wandb_project", "wandb_run_name", "wandb_watch", "wandb_log_model")
    assert values(config, *names) == ("p", "r", "all", True)
    assert notices == ()
    # As finetune.py has them where nothing is given.
    config, _ = resolved("jindo-core train --base_model m " + " ".join(f"--{name} ''" for name in names))
    assert values(config, *names) == (None, None, None, False)
    assert message("--run_name a --wandb_run_name b").startswith("--run_name: got it beside --wandb_run_name")
    config, _ = resolved("jindo-core train --base_model m --resume_from_checkpoint lora-alpaca/checkpoint-200")
    assert values(config, "resume_from_checkpoint", "save_steps", "save_total_limit", "load_best_model_at_end") == (
        "lora-alpaca/checkpoint-200", 200, 3, True,
    )  # fmt: skip


def test_files_take_the_same_names(tmp_path):
    path = tmp_path / "run.yaml"
    lines = ["model_name_or_path: m", "dataset: [a, b]", "bits: 8", "optim: paged_adamw", "bf16: true"]
    path.write_text("\n".join(lines))
    config, notices = resolved(f"jindo-core train --config {path}")
    assert values(config, "profile", "base_model", "data_path", "dtype") == ("qlora", "m", ("a", "b"), "bf16")
    assert len(notices) == 2
    path.write_text("model_name_or_path: m\nper_device_batch: 2\n")
    with pytest.raises(InputError, match=r"'per_device_batch'.* Did you mean 'per_device_train_batch_size'"):
        resolved(f"jindo-core train --config {path}")


def test_flags_win_over_a_file_by_whatever_name(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("base_model: m\nmicro_batch_size: 8\nlora_r: 4\nnum_train_epochs: 9\n")
    config, _ = resolved(f"jindo-core train --per_device_train_batch_size 2 --config {path} --num_epochs 1")
    assert values(config, "micro_batch_size", "lora_r", "num_epochs", "profile") == (2, 4, 1.0, "alpaca")
    config, _ = resolved(f"jindo-core train --config {path} --model_name_or_path other")
    assert values(config, "base_model", "profile") == ("other", "qlora")


@pytest.mark.parametrize("name", ["use_auth_token", "token"])
def test_a_token_is_never_shown(name):
    _, notices = resolved(f"{README} --dataset d --{name} hf_secret")
    assert "secret" not in "".join(notices)
    (notice,) = notices
    assert notice.startswith(f"--{name}: the Hub's own login counts")


# The table ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLAGS)
def test_the_table_is_sound(name):
    flag, own = FLAGS[name], settings(TrainConfig)
    assert flag.name not in own
    assert (flag.ours in own) is (flag.does in ("setting", "rule"))
    assert bool(flag.note) or flag.does in ("setting", "rule")


def test_other_values_name_settings_values():
    own = settings(TrainConfig)
    for name, served in OTHER_VALUES.items():
        assert set(served.values()) <= set(own[name].choices)
        assert not set(served) & set(own[name].choices)


def test_the_documentation_holds_the_table(repo_root):
    text = (repo_root / "docs" / "qlora.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `--(\w+)` \| (\w+) \| (.*) \|$", text, re.MULTILINE))
    said = {"setting": "mapped", "rule": "mapped", "inert": "none", "refused": "refused"}
    expected = {
        (flag.name, said[flag.does], " ".join(filter(None, [flag.ours and f"`--{flag.ours}`", flag.note])))
        for flag in FLAGS.values()
    }
    assert rows == expected
    hidden = [name for name, known in settings(TrainConfig).items() if known.hidden]
    assert [name for name in hidden if f"`--{name}`" not in text] == []


# qlora.py's dataclasses, with what it sets of Seq2SeqTrainingArguments.
ARGUMENTS = """
model_name_or_path trust_remote_code use_auth_token
eval_dataset_size max_train_samples max_eval_samples source_max_len target_max_len dataset dataset_format
cache_dir train_on_source mmlu_split mmlu_dataset do_mmlu_eval max_mmlu_samples mmlu_source_max_len full_finetune
adam8bit double_quant quant_type bits lora_r lora_alpha lora_dropout max_memory_MB report_to output_dir optim
per_device_train_batch_size gradient_accumulation_steps max_steps weight_decay learning_rate remove_unused_columns
max_grad_norm gradient_checkpointing do_train lr_scheduler_type warmup_ratio logging_steps group_by_length
save_strategy save_steps save_total_limit
max_new_tokens min_new_tokens do_sample num_beams num_beam_groups penalty_alpha use_cache temperature top_k top_p
typical_p diversity_penalty repetition_penalty length_penalty no_repeat_ngram_size
"""


def test_every_argument_of_qlora_py_is_known():
    names = ARGUMENTS.split()
    assert len(names) == 60
    assert [name for name in names if name not in accepted(TrainConfig)] == []
