"""Linear + cross entropy in chunks: torch's cross_entropy on the whole logits is the oracle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from jindo_core.kernels import dispatch
from jindo_core.kernels import linear_cross_entropy as module
from jindo_core.kernels.linear_cross_entropy import chunk_rows, linear_cross_entropy

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def make_case(m, h, v, dtype, ignored=3):
    generator = torch.Generator().manual_seed(m + v)
    hidden = torch.randn(m, h, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (torch.randn(v, h, generator=generator, dtype=torch.float64) / h**0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, v, (m,), generator=generator)
    labels[torch.randperm(m, generator=generator)[:ignored]] = -100
    return hidden, weight, labels


def oracle(hidden, weight, labels, count=None, smoothing=0.0):
    leaves = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    reduction = "mean" if count is None else "sum"
    loss = F.cross_entropy(leaves[0] @ leaves[1].T, labels, reduction=reduction, label_smoothing=smoothing)
    return (loss if count is None else loss / count), leaves


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 4 rows at a vocabulary of 50."""
    monkeypatch.setattr(module, "_CHUNK_LOGITS", 200)


@pytest.mark.parametrize("rows", [7, 11, 12, 15])  # 4, 8, 9 and 12 counted: below, on and past a chunk's end
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("small_chunks", "each_cpu_implementation")
def test_values_and_gradients(rows, smoothing, dtype, close):
    hidden, weight, labels = make_case(rows, 24, 50, dtype)
    loss = linear_cross_entropy(hidden, weight, labels, label_smoothing=smoothing)
    expected, leaves = oracle(hidden, weight, labels, smoothing=smoothing)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close("linear_cross_entropy", loss, expected, dtype)
    grads = torch.autograd.grad(loss, (hidden, weight))
    for grad, wanted in zip(grads, torch.autograd.grad(expected, leaves), strict=True):
        assert grad.dtype == dtype
        close("linear_cross_entropy", grad, wanted)
    assert torch.all(grads[0][labels == -100] == 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.usefixtures("small_chunks")
def test_gradcheck(smoothing):
    hidden, weight, labels = make_case(9, 5, 50, torch.float64)

    def loss(hidden, weight):
        return linear_cross_entropy(hidden, weight, labels, label_smoothing=smoothing)

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_a_given_count_divides(close):
    hidden, weight, labels = make_case(8, 16, 30, torch.float32)
    for count in (20, torch.tensor(20.0)):
        loss = linear_cross_entropy(hidden, weight, labels, count=count)
        expected, leaves = oracle(hidden, weight, labels, 20)
        close("linear_cross_entropy", loss, expected)
        (grad,) = torch.autograd.grad(loss * 3, hidden)
        close("linear_cross_entropy", grad, 3 * torch.autograd.grad(expected, leaves[0])[0])


def test_micro_batches_with_one_count_add_up_to_the_whole_batch(close):
    hidden, weight, labels = make_case(12, 16, 30, torch.float64, ignored=5)
    count = (labels != -100).sum()
    whole = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), weight)[0]
    parts = [
        torch.autograd.grad(linear_cross_entropy(hidden[s], weight, labels[s], count=count), weight)[0]
        for s in (slice(0, 3), slice(3, 12))
    ]
    close("linear_cross_entropy", sum(parts), whole)


@pytest.mark.parametrize("rows", [4, 0])
def test_no_label_that_counts_is_nan_as_in_torch(rows):
    hidden, weight, labels = make_case(rows, 8, 10, torch.float32, ignored=rows)
    assert torch.isnan(linear_cross_entropy(hidden, weight, labels))
    assert torch.isnan(F.cross_entropy(hidden @ weight.T, labels))
    loss = linear_cross_entropy(hidden, weight, labels, count=4)
    assert loss == 0
    assert torch.all(torch.autograd.grad(loss, hidden)[0] == 0)


def test_another_ignore_index():
    hidden, weight, labels = make_case(6, 8, 10, torch.float32, ignored=0)
    labels[2] = 7
    ours = linear_cross_entropy(hidden, weight, labels, ignore_index=7)
    torch.testing.assert_close(ours, F.cross_entropy(hidden @ weight.T, labels, ignore_index=7))


def test_large_logits_stay_finite():
    hidden = torch.full((2, 4), 300.0)
    weight = torch.tensor([[1.0] * 4, [-1.0] * 4])
    assert linear_cross_entropy(hidden, weight, torch.tensor([0, 0])) == 0
    assert linear_cross_entropy(hidden, weight, torch.tensor([1, 1])) == 2400


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_gradients_only_where_asked_for(needs):
    hidden, weight, labels = make_case(6, 8, 10, torch.float32)
    full = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), (hidden, weight))
    tensors = [t.detach().requires_grad_(need) for t, need in zip((hidden, weight), needs, strict=True)]
    loss = linear_cross_entropy(*tensors, labels)
    assert loss.requires_grad == any(needs)
    for tensor, need, wanted in zip(tensors, needs, full, strict=True):
        if need:
            assert torch.equal(torch.autograd.grad(loss, tensor)[0], wanted)


def test_no_gradient_is_made_under_no_grad(monkeypatch):
    asked = []

    def spy(*args):
        asked.append(args[5:7])
        return module.forward_reference(*args)

    monkeypatch.setattr(module.dispatch, "implementation", lambda *_, **__: spy)
    hidden, weight, labels = make_case(6, 8, 10, torch.float32)
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, labels)
    assert asked == [(False, False)]


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any operator's output has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.usefixtures("small_chunks")
def test_the_logits_are_never_whole():
    hidden, weight, labels = make_case(40, 8, 50, torch.float32, ignored=0)
    with LargestTensor() as whole:
        F.cross_entropy(hidden @ weight.T, labels)
    assert whole.elements == 40 * 50
    with LargestTensor() as chunked:
        module.forward_reference(hidden.detach(), weight.detach(), labels, -100, 0.1, True, True)
    assert chunked.elements == max(chunk_rows(50) * 50, weight.numel())


def test_workspace_bounds_a_chunk():
    v = 49152
    assert chunk_rows(v) * v <= 1 << 24
    assert module.workspace_bytes(10**9, 0, v, torch.bfloat16) <= 8 << 24
    assert module.workspace_bytes(2, 5, v, torch.bfloat16) == 2 * v * 6 + 2 * 2 * 5 * 2
    assert chunk_rows(1 << 30) == 1
    # In place: one copy of the logits in their own dtype, of twice the rows, in whole tiles of 128.
    assert chunk_rows(v, in_place=True) == 640
    assert module.workspace_bytes(10**9, 0, v, torch.bfloat16, in_place=True) == 640 * v * 2
    assert module.workspace_bytes(2, 0, 50, torch.float32, in_place=True) == 2 * 64 * 4
    assert chunk_rows(1 << 30, in_place=True) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    hidden, weight, labels = make_case(6, 8, 10, dtype)
    op = torch.ops.jindo.linear_cross_entropy
    opcheck(op, (hidden, weight, labels, -100, 0.0, True, True))
    opcheck(op, (hidden, weight.detach(), labels, -100, 0.1, True, False))
    opcheck(op, (hidden.detach(), weight.detach(), labels, -100, 0.0, False, False))


def test_compiles_into_one_graph_and_trains():
    hidden, weight, labels = make_case(9, 16, 20, torch.float32)

    def loss(hidden, weight):
        return linear_cross_entropy(torch.tanh(hidden), weight, labels) * 2

    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for grad, wanted in zip(torch.autograd.grad(compiled(hidden, weight), (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize(
    ("hidden", "weight", "labels", "message"),
    [
        ((4, 8), (10, 9), (4,), r"hidden \(4, 8\) and weight \(10, 9\)"),
        ((2, 4, 8), (10, 8), (4,), r"expected \[M, H\]"),
        ((4, 8), (10, 8), (3,), r"labels \(3,\), expected \[4\]"),
    ],
)
def test_refuses(hidden, weight, labels, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(torch.zeros(hidden), torch.zeros(weight), torch.zeros(labels, dtype=torch.long))


@pytest.mark.parametrize("smoothing", [-0.1, 1.5])
def test_refuses_a_label_smoothing_outside_0_to_1(smoothing):
    with pytest.raises(ValueError, match="expected 0 <= e <= 1"):
        linear_cross_entropy(*make_case(4, 8, 10, torch.float32), label_smoothing=smoothing)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(4, dtype=torch.int32)}, "torch.int32 labels"),
        ({"weight": torch.zeros(10, 8, dtype=torch.bfloat16)}, "weight in torch.bfloat16"),
        ({"weight": torch.zeros(10, 8, device="meta")}, "on meta"),
        ({"labels": torch.zeros(4, dtype=torch.int64, device="meta")}, "on cpu, got meta"),
    ],
)
def test_refuses_what_the_kernels_would_misread(change, message):
    good = {"hidden": torch.zeros(4, 8), "weight": torch.zeros(10, 8), "labels": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(good | change))


def test_the_upstream_gradient_is_not_rounded():
    """1/3 in bf16 is 0.2% off; so would be every element."""
    hidden, weight, labels = make_case(64, 32, 50, torch.bfloat16, ignored=0)
    once = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, count=1.0), hidden)[0].double()
    third = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, count=3.0), hidden)[0].double()
    assert abs((third.abs().sum() * 3 / once.abs().sum()).item() - 1) < 5e-4


def test_few_sizes_of_products_on_a_cpu_in_16_bits():
    """Each size is a product that oneDNN compiles and keeps."""
    like = torch.empty(0, dtype=torch.bfloat16)
    sizes = [module.product_rows(rows, 1 << 20, like) for rows in range(1, 4097)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 16 + 3 * 8
    assert all(rows <= size < rows + max(32, rows / 8 + 1) for rows, size in enumerate(sizes, 1))
    assert [module.product_rows(rows, 341, like) for rows in (0, 320, 330, 341)] == [0, 320, 341, 341]
    assert module.product_rows(77, 341, like.float()) == module.product_rows(77, 341, like.to("meta")) == 77


@pytest.mark.parametrize("rows", [5, 33, 200])
@pytest.mark.usefixtures("each_cpu_implementation")
def test_rows_that_only_fill_up_change_no_bit(rows, monkeypatch):
    hidden, weight, labels = make_case(rows, 64, 96, torch.bfloat16)
    slices = lambda: iter(weight.detach().split(40))  # noqa: E731

    def run():
        loss = linear_cross_entropy(hidden, weight.detach(), labels, label_smoothing=0.1)
        sliced = module.sliced_cross_entropy(hidden, slices, labels)
        found = [torch.autograd.grad(value, hidden)[0] for value in (loss, sliced)]
        return loss.detach(), sliced.detach(), *found

    filled = run()
    monkeypatch.setattr(module, "product_rows", lambda count, most, like: count)
    for one, other in zip(filled, run(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_rows_that_the_caller_has_counted_change_nothing(implementation):
    """Loss and gradients, bit for bit; labels elsewhere are not looked at; of no row the loss is NaN."""
    hidden, weight, labels = make_case(12, 8, 10, torch.float32)
    labels = labels.clone()
    labels[[1, 4, 5]] = -100
    hidden = hidden.detach().requires_grad_()
    rows = (labels != -100).nonzero()[:, 0]
    elsewhere = labels.clone()
    elsewhere[4] = 3  # a label that is not among the rows
    found = []
    with dispatch.override(implementation):
        for own, known in ((labels, None), (labels, rows), (elsewhere, rows)):
            loss = linear_cross_entropy(hidden, weight, own, counted_rows=known)
            found.append((loss, *torch.autograd.grad(loss, hidden)))
        none = linear_cross_entropy(hidden, weight, labels, counted_rows=rows[:0])
    for other in found[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[0], other, strict=True))
    assert none.isnan()
