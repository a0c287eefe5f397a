"""Every operator on the device against fp64, without pytest: values, gradients, and torch's own `opcheck`.

The tolerances are those of the tests (tests/kernels/conftest.py), read from the file: there is one table.
"""

from __future__ import annotations

import ast
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import peers
from bench.shapes import Shape
from bench.steps import ours, random_weights
from jindo_core.causal_lm import KVCache
from jindo_core.decoding import Decoder, GraphedStep
from jindo_core.kernels import adamw, dispatch, native, nf4
from jindo_core.kernels.attention import causal_attention
from jindo_core.kernels.dropout import keep_mask, mask
from jindo_core.kernels.linear_cross_entropy import linear_cross_entropy
from jindo_core.kernels.lora_matmul import Projection, lora_matmul, lora_matmul_group
from jindo_core.kernels.rms_norm import rms_norm
from jindo_core.kernels.rope import rope
from jindo_core.kernels.swiglu import swiglu
from jindo_core.model import LlamaForCausalLM
from jindo_core.paged_adamw import PagedAdamW
from jindo_core.plan import spread
from jindo_core.recompute import CheckpointOffload
from jindo_core.streaming import LayerStream
from jindo_core.tune import GEMV_MOST_ROWS

TABLE = Path(__file__).resolve().parent.parent / "tests" / "kernels" / "conftest.py"
DECODING_AGREES = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
"""Of two roads through a small model's layers."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Finding(NamedTuple):
    """what: implementation, dtype, shape and result. error and allowed: relative to the oracle's largest value."""

    what: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # False for NaN


@functools.cache
def tolerances() -> dict[str, dict[torch.dtype, float]]:
    """TOLERANCES of the tests, read without running the file, which needs pytest."""
    for node in ast.parse(TABLE.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "TOLERANCES":
            table = node.value
            assert isinstance(table, ast.Dict)
            return {
                ast.literal_eval(operator): {getattr(torch, key.attr): ast.literal_eval(value) for key, value in
                                             zip(row.keys, row.values, strict=True)}
                for operator, row in zip(table.keys, table.values, strict=True)
            }  # fmt: skip
    raise LookupError(f"{TABLE} has no TOLERANCES")


def implementations(operator: str, device: torch.device) -> list[str]:
    """Those of ours that run on the device."""
    names = [name for name in dispatch.IMPLEMENTATIONS[operator] if (name == "cpu") <= (device.type == "cpu")]
    if device.type == "cpu":
        return [n for n in names if n == "reference" or (n == "cpu" and native.library() is not None)]
    no_dot = operator.startswith("lora_matmul") and torch.cuda.get_device_capability(device) < (8, 0)
    return [name for name in names if not (name == "triton" and no_dot)]


def compare(
    what: str, operator: str, results: Sequence[Tensor], wanted: Sequence[Tensor], terms: int = 1
) -> Iterator[Finding]:
    """A finding for each result against its fp64 oracle; `terms`: of the longest sum in it.

    The tests' tolerances are for sums of up to 1,024 products. An fp32 sum's error grows with the root of its
    length (Higham 1993, on random signs); what is rounded to 16 bits at the end hides that.
    """
    for i, (result, want) in enumerate(zip(results, wanted, strict=True)):
        scale = max(want.abs().max().item(), 1e-300)
        error = (result.double() - want).abs().max().item() / scale
        allowed = tolerances()[operator][result.dtype]
        if result.dtype == torch.float32:
            allowed *= math.sqrt(max(terms / 1024, 1))
        yield Finding(f"{what} result {i}", error if math.isfinite(error) else math.inf, allowed)


def differentiate(function: Callable[..., Any], leaves: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
    """The function's results and its gradients."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    result = function(*leaves)
    outputs = result if isinstance(result, tuple) else (result,)
    upstream = [gradient.to(y.dtype) for gradient, y in zip(upstream, outputs, strict=True)]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def against_fp64(
    operator: str, device: torch.device, label: str, ours: Callable[..., Any], oracle: Callable[..., Any],
    leaves: Sequence[Tensor], upstream: Sequence[Tensor], *, also: Sequence[str] = (), terms: int = 1,
) -> Iterator[Finding]:  # fmt: skip
    """Values and gradients of each implementation, on the same inputs in each dtype.

    Args:
        leaves, upstream: fp64; rounded to each dtype, so that the oracle sees what ours sees.
        also: operators whose implementations are tried too (a backward pass of its own).
        terms: as in `compare`.
    """
    names = dict.fromkeys(name for key in (operator, *also) for name in implementations(key, device))
    if operator == "lora_matmul" and len(leaves[0]) > GEMV_MOST_ROWS:
        names.pop("gemv", None)
    for dtype in DTYPES:
        inputs, gradients = [t.to(dtype) for t in leaves], [t.to(dtype) for t in upstream]
        wanted = differentiate(oracle, [t.double() for t in inputs], [t.double() for t in gradients])
        for name in names:
            with dispatch.override(name):
                results = differentiate(ours, inputs, gradients)
            short = str(dtype).removeprefix("torch.")
            yield from compare(f"{operator} {name} {short} {label}", operator, results, wanted, terms)


def randn(device: torch.device, *shape: int) -> Tensor:
    """fp64, the same numbers on every device."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)


# --- the operators --------------------------------------------------------------------------------------


def check_nf4(device: torch.device, quick: bool) -> Iterator[Finding]:
    """Bit for bit the CPU's reference, which the tests hold to bitsandbytes'."""
    cpu = torch.device("cpu")
    for shape in [(7, 13), (64, 64), (33, 130)] + ([] if quick else [(4096, 4096), (1000, 1003)]):
        for dtype in DTYPES:
            weight = (randn(cpu, *shape) * 0.02).to(dtype)
            weight.view(-1)[: min(64, weight.numel())] = 0
            with dispatch.override("reference"):
                packed, absmax = nf4.nf4_quantize(weight)
                nested = nf4.nf4_quantize_absmax(absmax)
                values = [
                    nf4.nf4_dequantize(packed, absmax, None, None, shape, dtype=dtype),
                    nf4.nf4_dequantize(packed, *nested, shape, dtype=dtype),
                ]
            short = f"{str(dtype).removeprefix('torch.')} {shape[0]}x{shape[1]}"
            for name in implementations("nf4_dequantize", device):
                with dispatch.override(name):
                    mine = [part.cpu() for part in nf4.nf4_quantize(weight.to(device))]
                    again = [part.cpu() for part in nf4.nf4_quantize_absmax(absmax.to(device), nested[2].to(device))]
                    parts = [part.to(device) for part in nested]
                    back = [
                        nf4.nf4_dequantize(packed.to(device), absmax.to(device), None, None, shape, dtype=dtype).cpu(),
                        nf4.nf4_dequantize(packed.to(device), *parts, shape, dtype=dtype).cpu(),
                    ]
                pairs = zip([*mine, *again, *back], [packed, absmax, *nested, *values], strict=True)
                wrong = [index for index, (a, b) in enumerate(pairs) if not torch.equal(a, b)]
                yield Finding(f"nf4 {name} {short}, parts that differ: {wrong}", float(len(wrong)), 0)


def check_lora_matmul(device: torch.device, quick: bool) -> Iterator[Finding]:
    """The LoRA linear; every implementation that takes M rows."""
    shapes = [(1, 192, 40), (3, 130, 33), (4, 256, 64), (17, 320, 48)]
    shapes += [] if quick else [(1, 4096, 4096), (2, 4096, 11008), (32, 4096, 4096), (200, 1024, 640)]
    for rows, k, n in shapes:
        weight = (randn(torch.device("cpu"), n, k) * 0.02).float()
        with dispatch.override("reference"):
            packed, absmax = nf4.nf4_quantize(weight)
            parts = (packed, *nf4.nf4_quantize_absmax(absmax))
            wide = nf4.nf4_dequantize(*parts, (n, k), dtype=torch.float64).to(device)
        codes = [part.to(device) for part in parts]

        def ours(x: Tensor, a: Tensor, b: Tensor, codes: Any = codes, n: int = n) -> Tensor:
            return lora_matmul(x, *codes, n, a, b, scale=2.0)

        def oracle(x: Tensor, a: Tensor, b: Tensor, wide: Tensor = wide) -> Tensor:
            return x @ wide.t() + 2.0 * (x @ a.t()) @ b.t()

        leaves = [randn(device, rows, k), randn(device, 8, k) / math.sqrt(k), randn(device, n, 8) * 0.1]
        label = f"M={rows} K={k} N={n}"
        yield from against_fp64(
            "lora_matmul", device, label, ours, oracle, leaves, [randn(device, rows, n)], also=["lora_matmul_backward"],
            terms=max(k, n),
        )  # fmt: skip
    yield from _check_group(device)
    x, seed = randn(device, 64, 1024).float(), torch.tensor([7], dtype=torch.int32, device=device)
    wanted = x * keep_mask(x.shape, 0.3, seed)
    for name in implementations("dropout_mask", device):
        with dispatch.override(name):
            yield Finding(f"dropout_mask {name}", float((mask(x, 0.3, seed) != wanted).sum()), 0)


def _check_group(device: torch.device) -> Iterator[Finding]:
    """Two layers on one x: with dropout, with W kept for dX, and without double quantization; few rows and many."""
    k, widths, seed = 320, (48, 33), torch.tensor([7], dtype=torch.int32, device=device)
    rounded = []
    for n in widths:
        with dispatch.override("reference"):
            rounded.append(nf4.nf4_quantize((randn(torch.device("cpu"), n, k) * 0.02).float()))
    for rows, dropout, keep_weight, double in [
        (3, 0.0, False, False), (3, 0.3, False, True), (70, 0.3, False, True), (70, 0.0, True, True),
        (70, 0.0, False, False),
    ]:  # fmt: skip
        parts = [
            [packed, *(nf4.nf4_quantize_absmax(absmax) if double else (absmax, None, None))]
            for packed, absmax in rounded
        ]
        wide = [
            nf4.nf4_dequantize(*own, (n, k), dtype=torch.float64).to(device)
            for own, n in zip(parts, widths, strict=True)
        ]
        codes = [[None if part is None else part.to(device) for part in own] for own in parts]
        kept = keep_mask(torch.Size((rows, k)), dropout, seed).double() / (1 - dropout) if dropout else 1.0

        def ours(x: Tensor, *ab: Tensor, codes: Any = codes, p: float = dropout, w: bool = keep_weight) -> Tensor:
            layers = [
                Projection(*own, n, *ab[2 * i : 2 * i + 2], 2.0)
                for i, (own, n) in enumerate(zip(codes, widths, strict=True))
            ]
            return lora_matmul_group(x, layers, dropout=p, seed=seed, keep_weight=w)

        def oracle(x: Tensor, *ab: Tensor, wide: Any = wide, kept: Any = kept) -> Tensor:
            sides = [x @ w.t() + 2.0 * ((x * kept) @ ab[2 * i].t()) @ ab[2 * i + 1].t() for i, w in enumerate(wide)]
            return torch.cat(sides, dim=1)

        leaves = [randn(device, rows, k)]
        for n in widths:
            leaves += [randn(device, 8, k) / math.sqrt(k), randn(device, n, 8) * 0.1]
        label = f"group, M={rows} dropout={dropout} keep_weight={keep_weight} double={double}"
        yield from against_fp64(
            "lora_matmul", device, label, ours, oracle, leaves, [randn(device, rows, sum(widths))],
            also=["lora_matmul_backward"],
        )  # fmt: skip


def check_rms_norm(device: torch.device, quick: bool) -> Iterator[Finding]:
    for shape in [(3, 7), (5, 768)] + ([] if quick else [(2048, 4096), (64, 8192)]):
        leaves = [randn(device, *shape), 1 + 0.3 * randn(device, shape[1])]
        yield from against_fp64(
            "rms_norm", device, f"{shape[0]}x{shape[1]}", lambda x, w: rms_norm(x, w, 1e-5),
            lambda x, w: F.rms_norm(x, w.shape, w, 1e-5), leaves, [randn(device, *shape)], also=["rms_norm_backward"],
        )  # fmt: skip


def check_swiglu(device: torch.device, quick: bool) -> Iterator[Finding]:
    for shape in [(3, 7), (5, 200)] + ([] if quick else [(2048, 11008)]):
        leaves = [randn(device, *shape), randn(device, *shape).flip(0)]
        yield from against_fp64(
            "swiglu", device, f"{shape[0]}x{shape[1]}", swiglu, lambda g, u: F.silu(g) * u, leaves,
            [randn(device, *shape)], also=["swiglu_backward"],
        )  # fmt: skip


def check_rope(device: torch.device, quick: bool) -> Iterator[Finding]:
    for b, t, h, g, d in [(2, 5, 4, 2, 16)] + ([] if quick else [(2, 1024, 32, 8, 128)]):
        angle = torch.rand(1, t, d // 2, device=device) * 6.28
        cos, sin = angle.cos(), angle.sin()

        def oracle(q: Tensor, k: Tensor, cos: Tensor = cos, sin: Tensor = sin) -> tuple[Tensor, Tensor]:
            turned = torch.complex(cos.double(), sin.double())[:, :, None]
            products = [torch.complex(*x.chunk(2, dim=-1)) * turned for x in (q, k)]
            first, second = (torch.cat((z.real, z.imag), dim=-1) for z in products)
            return first, second

        leaves = [randn(device, b, t, h, d), randn(device, b, t, g, d)]
        yield from against_fp64(
            "rope", device, f"{b}x{t}x{h}+{g}x{d}", lambda q, k, c=cos, s=sin: rope(q, k, c, s), oracle, leaves,
            [leaf.flip(1) for leaf in leaves],
        )  # fmt: skip


def check_linear_cross_entropy(device: torch.device, quick: bool) -> Iterator[Finding]:
    """The loss and dH, and dW of a trained head, with label smoothing and without."""
    for m, h, v in [(9, 64, 50), (33, 96, 257)] + ([] if quick else [(600, 2048, 32000)]):
        head = randn(device, v, h) / math.sqrt(h)
        labels = torch.arange(m, device=device) * 7 % v
        labels[::4] = -100
        for dtype in DTYPES:
            leaves, one = [randn(device, m, h).to(dtype), head.to(dtype)], torch.ones((), device=device)
            for smoothing in (0.0, 0.1):
                wanted = differentiate(
                    lambda x, w, y=labels, e=smoothing: F.cross_entropy(x @ w.t(), y, label_smoothing=e),
                    [leaf.double() for leaf in leaves], [one.double()],
                )  # fmt: skip
                for name in implementations("linear_cross_entropy", device):
                    with dispatch.override(name):
                        results = differentiate(
                            lambda x, w, y=labels, e=smoothing: linear_cross_entropy(x, w, y, label_smoothing=e),
                            leaves, [one],
                        )  # fmt: skip
                    what = f"linear_cross_entropy {name} {str(dtype).removeprefix('torch.')} {m}x{h}x{v} e={smoothing}"
                    # The loss is fp32 whatever its logits were rounded to.
                    results = [result.to(dtype) for result in results]
                    yield from compare(what, "linear_cross_entropy", results, wanted, terms=v)


def check_attention(device: torch.device, quick: bool) -> Iterator[Finding]:
    for b, t, h, g, d in [(2, 9, 4, 2, 16)] + ([] if quick else [(1, 512, 8, 2, 128)]):
        def oracle(q: Tensor, k: Tensor, v: Tensor, r: int = h // g) -> Tensor:
            keys, values = (x.repeat_interleave(r, dim=2) for x in (k, v))
            scores = torch.einsum("bthd,bshd->bhts", q, keys) / math.sqrt(q.shape[3])
            later = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).triu(1)
            return torch.einsum("bhts,bshd->bthd", scores.masked_fill(later, -math.inf).softmax(-1), values)

        leaves = [randn(device, b, t, h, d), randn(device, b, t, g, d), randn(device, b, t, g, d).flip(1)]
        yield from against_fp64(
            "attention", device, f"{b}x{t}x{h}/{g}x{d}", causal_attention, oracle, leaves, [leaves[0].flip(1)],
            also=["attention_backward"],
        )  # fmt: skip


def check_adamw(device: torch.device, quick: bool) -> Iterator[Finding]:
    """Three steps beside the CPU's reference, which the tests hold to torch bit for bit; 8-bit moments beside it and,
    where there is one, bitsandbytes' own kernel."""
    cpu, count = torch.device("cpu"), 5000 if quick else 300_077
    start = randn(cpu, count)
    grads = [randn(cpu, count).roll(1000 * step) for step in range(1, 4)]

    def run(dtype: torch.dtype, where: torch.device, name: str, eight: bool, seed: int | None) -> list[Tensor]:
        param = start.to(where, dtype)
        states = [torch.zeros(count, device=where) for _ in range(2)]
        if eight:
            blocks = -(-count // adamw.BLOCK)
            states = [torch.zeros(count, dtype=torch.uint8, device=where) for _ in range(2)]
            states += [torch.zeros(blocks, device=where) for _ in range(2)]
        step = adamw.adamw_8bit_ if eight else adamw.adamw_
        with dispatch.override(name):
            for t, grad in enumerate(grads, 1):
                step(param, grad.to(where, dtype), *states, adamw.Update(1e-3, 0.9, 0.999, 1e-8, 0.1, t), seed=seed)
        return [t.cpu().float() for t in (param, *states)]

    for dtype in DTYPES:
        for eight, seed in ((False, None), (True, None), (False, 5)):
            wanted = run(dtype, cpu, "reference", eight, seed)
            for name in implementations("adamw", device):
                made = run(dtype, device, name, eight, seed)
                kind = ", 8-bit" if eight else ", stochastic" if seed else ""
                what = f"adamw {name} {str(dtype).removeprefix('torch.')}{kind}"
                # A step is 1e-3, and an ulp of a 16-bit parameter of 4 is 2^-6 (bf16) or 2^-9: a root that is one ulp
                # off turns a rounding now and then, and a code midway between two.
                share = (made[0] - wanted[0]).abs().mean().item() / 1e-3
                yield Finding(what, share if math.isfinite(share) else math.inf, 1e-4 if eight else 1e-5)
                if not eight and not seed:
                    yield from compare(what, "adamw", made[1:], [t.double() for t in wanted[1:]])
    if device.type == "cuda" and peers.available("bitsandbytes", device):
        yield _beside_bitsandbytes(device, start, grads)


def _beside_bitsandbytes(device: torch.device, start: Tensor, grads: Sequence[Tensor]) -> Finding:
    step = peers.load("bitsandbytes").functional.optimizer_update_8bit_blockwise
    count = start.numel()
    params, states = [start.to(device, torch.float32) for _ in range(2)], []
    for _ in params:
        codes = [torch.zeros(count, dtype=torch.uint8, device=device) for _ in range(2)]
        states.append([*codes, *(torch.zeros(-(-count // adamw.BLOCK), device=device) for _ in range(2))])
    maps = adamw.dynamic_map(device), adamw.unsigned_map(device)
    for t, grad in enumerate(grads, 1):
        g = grad.to(device, torch.float32)
        adamw.adamw_8bit_(params[0], g, *states[0], adamw.Update(1e-3, 0.9, 0.999, 1e-8, 0.0, t))
        step("adam", g, params[1], *states[1][:2], 0.9, 0.999, 0.0, 0.0, 1e-8, t, 1e-3, *maps, *states[1][2:])
    share = (params[0] - params[1]).abs().mean().item() / 1e-3
    return Finding("adamw 8-bit beside bitsandbytes, share of a step", share, 0.02)


def check_decoding(device: torch.device, quick: bool) -> Iterator[Finding]:
    """The prepared step (on a GPU a CUDA graph) beside the model's modules, over the edge of a window; and again
    after the cache was set back."""
    shape = Shape("check", 256, 512, 2, 4, 2, 300)
    prompt, new = (5, 4) if quick or device.type == "cpu" else (GraphedStep.WINDOW - 3, 6)
    for dtype in (torch.float32, torch.bfloat16):
        model = ours(shape, random_weights(shape, dtype, device), train=False)
        assert isinstance(model, LlamaForCausalLM)
        ids = torch.randint(300, (2, prompt + new), device=device)
        caches = [KVCache(model.config, 2, prompt + new, dtype, device) for _ in range(2)]
        with torch.no_grad():
            for cache in caches:
                model.model(ids[:, :prompt], cache=cache)
            decoder = Decoder(model, caches[0])
            for again in range(2):
                caches[0].length = caches[1].length = prompt
                for i in range(prompt, prompt + new):
                    wanted = model.lm_head(model.model(ids[:, i : i + 1], cache=caches[1])[:, -1]).double()
                    what = f"decoding {str(dtype).removeprefix('torch.')} token {i}{', again' if again else ''}"
                    made = decoder(ids[:, i])
                    error = ((made.double() - wanted).abs().max() / wanted.abs().max()).item()
                    yield Finding(what, error if math.isfinite(error) else math.inf, DECODING_AGREES[dtype])


def check_memory(device: torch.device, quick: bool) -> Iterator[Finding]:
    """Paged moments beside resident ones, and a streamed, offloaded model beside the same one at home: bit for bit."""
    results = []
    for budget in (1 << 60, 4 << 20, 0):
        params = [torch.nn.Parameter(randn(device, 700, 1000 + i).float()) for i in range(2 if quick else 8)]
        optimizer = PagedAdamW(params, lr=1e-2, resident_bytes=budget)
        for step in range(1, 4):
            for i, param in enumerate(params):
                param.grad = randn(device, 700, 1000 + i).float().roll(step)
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in params]))
    for budget, result in zip(("a page", "nothing"), results[1:], strict=True):
        yield Finding(f"paged AdamW, {budget} resident", float((result != results[0]).sum()), 0)
    shape = Shape("check", 256, 512, 4, 4, 2, 300)
    ids = torch.randint(300, (2, 33), generator=torch.Generator().manual_seed(0)).to(device)
    gradients = []
    for streamed in (0, 2, 4):
        model = ours(shape, random_weights(shape, torch.bfloat16, device), train=True, checkpointing=True)
        assert isinstance(model, LlamaForCausalLM)
        if streamed:
            stream = model.model.stream = LayerStream(device)
            for number in spread(streamed, 4):
                stream.take(number, model.model.layers[number])
            model.model.checkpoint_offload = CheckpointOffload()
        trained = [p for p in model.parameters() if p.requires_grad]
        for _ in range(2):
            found = torch.autograd.grad(model(ids, labels=ids).loss, trained)
        gradients.append(torch.cat([g.flatten() for g in found]))
    for streamed, found in zip((2, 4), gradients[1:], strict=True):
        yield Finding(f"{streamed} of 4 layers streamed, gradients", float((found != gradients[0]).sum()), 0)


def check_opcheck(device: torch.device, quick: bool) -> Iterator[Finding]:
    """Schema, fake, autograd registration and tracing of every operator, as it runs on this device."""
    ops = torch.ops.jindo
    weight = (randn(device, 24, 64) * 0.02).float()
    packed, absmax = nf4.nf4_quantize(weight)
    quantized, nested, offset = nf4.nf4_quantize_absmax(absmax)
    parts = ([packed], [quantized], [nested], [offset], [24], 64)
    x = randn(device, 3, 64).float()
    a, b = randn(device, 4, 64).float().requires_grad_(), randn(device, 24, 4).float().requires_grad_()
    heads = randn(device, 1, 5, 2, 8).float()
    angle = torch.rand(1, 5, 4, device=device)
    head, labels = randn(device, 50, 64).float(), torch.tensor([1, -100, 3], device=device)
    seed = torch.tensor([7], dtype=torch.int32, device=device)
    cases: dict[str, tuple[Any, ...]] = {
        "nf4_quantize": (weight, 64),
        "nf4_quantize_absmax": (absmax, offset),
        "nf4_dequantize": (packed, quantized, nested, offset, [24, 64], 64, torch.float32),
        "nf4_dequantize_": (torch.empty_like(weight), packed, quantized, nested, offset, 64),
        "lora_matmul": (x.clone().requires_grad_(), *parts, [a], [b], [2.0], 0.0, None, False),
        "lora_matmul, dropout": (x.clone().requires_grad_(), *parts, [a], [b], [2.0], 0.3, seed, False),
        "lora_matmul, keep_weight": (x.clone().requires_grad_(), *parts, [a], [b], [2.0], 0.0, None, True),
        "causal_attention": (*(heads.roll(i, 1).requires_grad_() for i in range(3)), 4),
        "rms_norm": (x.clone().requires_grad_(), torch.ones(64, device=device), 1e-5),
        "swiglu": (x.clone().requires_grad_(), x.flip(0).contiguous().requires_grad_()),
        "rope": (heads.clone().requires_grad_(), heads.flip(1).requires_grad_(), angle.cos(), angle.sin(), False),
        "linear_cross_entropy": (x.clone().requires_grad_(), head, labels, -100, 0.0, True, False),
    }
    tests = ("test_schema", "test_faketensor") if quick else None
    for name, arguments in cases.items():
        more = {"test_utils": tests} if tests else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            operator = getattr(ops, name.partition(",")[0]).default
            said = torch.library.opcheck(operator, arguments, raise_exception=False, **more)
        failed = {test: str(result)[:200] for test, result in said.items() if result != "SUCCESS"}
        yield Finding(f"opcheck {name} {failed or ''}".strip(), float(len(failed)), 0)


CHECKS: dict[str, Callable[[torch.device, bool], Iterator[Finding]]] = {
    "nf4": check_nf4,
    "rms_norm": check_rms_norm,
    "swiglu": check_swiglu,
    "rope": check_rope,
    "linear_cross_entropy": check_linear_cross_entropy,
    "attention": check_attention,
    "lora_matmul": check_lora_matmul,
    "adamw": check_adamw,
    "decoding": check_decoding,
    "memory": check_memory,
    "opcheck": check_opcheck,
}
