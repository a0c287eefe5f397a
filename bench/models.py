"""The same random LLaMA in our engine and in transformers + peft + bitsandbytes, for the benchmarks of whole steps."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import peft
import torch
import transformers
from torch import nn

from jindo_core.decoding import Decoder
from jindo_core.loader import load_model
from jindo_core.lora import attach_lora
from jindo_core.model import KVCache

transformers.utils.logging.disable_progress_bar()

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# name -> hidden, MLP, layers, heads, key/value heads; a vocabulary of 32,000. "1b" is TinyLlama's shape.
SHAPES = {"110m": (768, 2048, 12, 12, 12), "1b": (2048, 5632, 22, 32, 4)}


def write_checkpoint(shape: str, folder: Path) -> Path:
    """A LLaMA of that shape with random bf16 weights, as transformers saves one."""
    hidden, inner, layers, heads, groups = SHAPES[shape]
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=2048, rms_norm_eps=1e-5,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    return folder


def ours(folder: Path, *, train: bool) -> nn.Module:
    model = load_model(folder, dtype="bf16", device="cpu")
    return attach_lora(model, r=8, alpha=16, target_modules=TARGETS).train() if train else model


def peer(folder: Path, *, train: bool, checkpointing: bool = True) -> nn.Module:
    """As the peers' users load one: NF4 with double quantization, and full gradient checkpointing to train."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map="cpu",
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )  # fmt: skip
    assert isinstance(model.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    if not train:
        return model.eval()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)).train()


def training_step(model: nn.Module, tokens: int = 512) -> Callable[[], float]:
    """One step of one sequence, every token supervised, with torch's AdamW; a call returns the seconds."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, 32000, (1, tokens))

    def step() -> float:
        started = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert loss.isfinite()
        return time.perf_counter() - started

    return step


def decoding(model: nn.Module, who: str, new: int = 32, prompt: int = 16) -> Callable[[], float]:
    """Greedy decoding of `new` tokens behind a prompt; a call returns the seconds, without the prompt's."""
    ids = torch.randint(0, 32000, (1, prompt))

    @torch.no_grad()
    def run_ours() -> float:
        cache = KVCache(model.config, 1, prompt + new, model.dtype, model.device)
        logits = model.lm_head(model.model(ids, cache=cache)[:, -1])
        started = time.perf_counter()
        decoder = Decoder(model, cache)
        for _ in range(new):
            logits = decoder(logits.argmax(-1))
        return time.perf_counter() - started

    @torch.no_grad()
    def run_peer() -> float:
        output = model(ids, use_cache=True)
        started = time.perf_counter()
        for _ in range(new):
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
        return time.perf_counter() - started

    return run_ours if who == "jindo" else run_peer


def peak_mib() -> float:
    """The most this process has held; not ru_maxrss, which a child inherits from the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def main() -> None:
    """`python -m bench.models train|decode jindo|peer FOLDER`: load, run, and print seconds to load and peak MiB."""
    what, who, folder = sys.argv[1:4]
    started = time.perf_counter()
    model = {"jindo": ours, "peer": peer}[who](Path(folder), train=what == "train")
    loaded = time.perf_counter() - started
    run = training_step(model) if what == "train" else decoding(model, who)
    for _ in range(3):
        run()
    print(f"{loaded:.2f} {peak_mib():.0f}")


if __name__ == "__main__":
    main()
