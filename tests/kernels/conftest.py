"""What all operator tests share: the tolerance table, and weights made to be awkward."""

from __future__ import annotations

import pytest
import torch

from jindo_core.kernels import dispatch, native

# Largest error allowed against an fp64 oracle on the same inputs, relative to the oracle's largest magnitude.
# The one table for every operator, implementation and machine. 0: bit-exact. Measured errors are 2 to 5 times
# (fp64: more) smaller: an fp16 or bf16 product is rounded once or twice (2^-11, 2^-8) after an fp32 accumulation.
TOLERANCES = {
    "nf4_quantize": {torch.float64: 0, torch.float32: 0, torch.float16: 0, torch.bfloat16: 0},
    "nf4_dequantize": {torch.float64: 0, torch.float32: 0, torch.float16: 0, torch.bfloat16: 0},
    "attention": {torch.float64: 1e-14, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2},
    "lora_matmul": {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2},
    "linear_cross_entropy": {
        torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2,
    },
    # One rounding, or two (xhat's), after fp32 arithmetic: half an ulp is 2^-11 or 2^-8 of a number's own size.
    "rms_norm": {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3},
    "swiglu": {torch.float64: 1e-14, torch.float32: 5e-7, torch.float16: 6e-4, torch.bfloat16: 4.5e-3},
    "rope": {torch.float64: 1e-14, torch.float32: 5e-7, torch.float16: 6e-4, torch.bfloat16: 4.5e-3},
    # Moments, against the reference's: a few fused roundings.
    "adamw": {torch.float32: 1e-6},
    # W keeps its fp32 product, unlike in lora_matmul: the one rounding is y's.
    "lora_gemv": {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4.5e-3},
}  # fmt: skip


class Oracles:
    """Values and gradients in fp64, from torch's own operators or from complex numbers."""

    @staticmethod
    def _with_gradients(outputs, leaves, *upstream):
        return (*outputs, *torch.autograd.grad(outputs, leaves, [g.double() for g in upstream]))

    @classmethod
    def rms_norm(cls, x, weight, eps, dy):
        """y, dX, dW."""
        x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
        y = torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
        return cls._with_gradients([y], (x, weight), dy)

    @classmethod
    def swiglu(cls, gate, up, dh):
        """h, dG, dU."""
        gate, up = (t.detach().double().requires_grad_() for t in (gate, up))
        return cls._with_gradients([torch.nn.functional.silu(gate) * up], (gate, up), dh)

    @classmethod
    def rope(cls, q, k, cos, sin, dq, dk):
        """q', k', dQ, dK; a pair is a complex number, turned by cos + i sin."""
        q, k = (t.detach().double().requires_grad_() for t in (q, k))
        angle = torch.complex(cos.double(), sin.double())[:, :, None]

        def turn(x):
            turned = torch.complex(*x.chunk(2, dim=-1)) * angle
            return torch.cat((turned.real, turned.imag), dim=-1)

        return cls._with_gradients([turn(q), turn(k)], (q, k), dq, dk)


@pytest.fixture(scope="session")
def oracles():
    return Oracles


FIGURES = pytest.StashKey()


@pytest.fixture(scope="session")
def figures(pytestconfig):
    """The list of what the gates measured; printed as one table when the session ends."""
    return pytestconfig.stash.setdefault(FIGURES, [])


def pytest_terminal_summary(terminalreporter, config):
    if found := config.stash.get(FIGURES, None):
        from compiled import table  # imports Triton

        terminalreporter.write_line(table(found))


@pytest.fixture(params=["reference", *native.LEVELS])
def each_cpu_implementation(request):
    """Runs a test with the PyTorch reference, and with the C kernels at every instruction set there is."""
    if request.param == "reference":
        with dispatch.override("reference"):
            yield request.param
        return
    with dispatch.override("cpu"), native.level(request.param):  # on an older processor, the best that it has
        yield request.param


@pytest.fixture(scope="session")
def close():
    """close(operator, actual, expected, dtype=None): assert within the table's tolerance of an fp64 oracle."""

    def check(operator, actual, expected, dtype=None):
        allowed = TOLERANCES[operator][dtype or actual.dtype]
        assert actual.shape == expected.shape
        if allowed == 0:
            assert torch.equal(actual, expected)
            return
        error = (actual.double() - expected.double()).abs().max().item()
        bound = allowed * expected.abs().max().item()
        assert error <= bound, f"{operator} {dtype or actual.dtype}: error {error:.3g}, allowed {bound:.3g}"

    return check


@pytest.fixture(scope="session")
def make_weight():
    """make_weight(shape, dtype, seed=0): normal values with an outlier, a zero block and a nearly zero one."""

    def make(shape, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.02
        flat = weight.view(-1)
        flat[flat.numel() // 3] = 1.5
        if flat.numel() > 256:
            flat[64:128] = 0.0
            flat[128:192] *= 1e-33
        return weight.to(dtype)

    return make


@pytest.fixture
def nan_in_fresh_memory():
    """torch.empty gives NaN (integers: the largest value), so that what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.isnan(torch.empty(3)).all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def walled():
    """walled(tensor): the same values between two walls of NaN (integers: the largest value), contiguous."""

    def wall(tensor):
        worst = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
        count = tensor.numel()
        buffer = torch.full((count + 2048,), worst, dtype=tensor.dtype)
        buffer[1024 : 1024 + count] = tensor.detach().reshape(-1)
        return buffer[1024 : 1024 + count].view(tensor.shape)

    return wall
