"""What a kernel does on a GPU, seen on a CPU: the same results, no question to the device, nothing elsewhere."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from pefttutor import kernels
from pefttutor.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from pefttutor.kernels.fisher import squared_gradients, squared_gradients_reference
from pefttutor.kernels.flat_entries import read, selected, write
from pefttutor.kernels.lora_linear import lora_linear, lora_linear_reference
from pefttutor.kernels.recompute import recompute_activations
from pefttutor.kernels.sparse_adamw import SparseAdamW, SparseSGD
from pefttutor.memory.allocator import transient_bytes

pytestmark = pytest.mark.usefixtures("short_way")


def draw(*shape, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype, device="cpu").to(device)


def lora(device="cpu"):
    shapes = {"x": (3, 5, 6), "weight": (7, 6), "bias": (7,), "lora_A": (2, 6), "lora_B": (7, 2)}
    return {
        name: draw(*shape, device=device, seed=i).requires_grad_()
        for i, (name, shape) in enumerate(shapes.items())
    }


def head(device="cpu"):
    hidden, weight, bias = (
        draw(13, 5, device=device),
        draw(11, 5, device=device, seed=1),
        draw(11, device=device),
    )
    labels = torch.arange(13, device="cpu") % 11
    labels = labels.masked_fill(labels % 3 == 0, -100).to(device)
    return [t.requires_grad_() for t in (hidden, weight, bias)], labels


def test_lora_linear(watched):
    tensors = lora()
    y = lora_linear_reference(*tensors.values(), 0.5)
    incoming = draw(*y.shape, seed=9)
    expected = torch.autograd.grad(y, list(tensors.values()), incoming)
    with watched() as asked:
        ours = lora_linear(*tensors.values(), 0.5)
        found = torch.autograd.grad(ours, list(tensors.values()), incoming)
    assert not asked
    torch.testing.assert_close([ours, *found], [y, *expected])


def test_lora_leaves_its_backward_pass_to_autograd_and_keeps_nothing_more():
    """A Python backward pass gives a GPU its orders too slowly. Kept are x, x Aᵀ and what exists anyway."""
    tensors, kept = lora(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = lora_linear(*tensors.values(), 0.5)
    given = {t.untyped_storage().data_ptr() for t in tensors.values()}
    new = {t.untyped_storage().data_ptr(): t for t in kept if t.untyped_storage().data_ptr() not in given}
    assert [tuple(t.shape) for t in new.values()] == [(15, 2)]  # x Aᵀ
    assert "LoRALinear" not in type(y.grad_fn).__name__


@pytest.mark.parametrize("max_bytes", [None, 600])
def test_linear_cross_entropy(watched, max_bytes):
    tensors, labels = head()
    loss = linear_cross_entropy_reference(tensors[0], tensors[1], labels, tensors[2])
    expected = torch.autograd.grad(loss * 3, tensors)
    with watched() as asked:
        ours = linear_cross_entropy(tensors[0], tensors[1], labels, tensors[2], max_bytes=max_bytes)
        found = torch.autograd.grad(ours * 3, tensors)
    assert not asked
    torch.testing.assert_close([ours, *found], [loss, *expected])


def test_padding_that_is_not_finite_does_not_count(watched):
    tensors, labels = head()
    expected = torch.autograd.grad(linear_cross_entropy(tensors[0], tensors[1], labels, tensors[2]), tensors)
    with torch.no_grad():
        tensors[0][labels == -100] = torch.nan
    found = torch.autograd.grad(linear_cross_entropy(tensors[0], tensors[1], labels, tensors[2]), tensors)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("ours", "torchs", "settings"),
    [
        (SparseAdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
        (SparseSGD, torch.optim.SGD, {"momentum": 0.9}),
    ],
)
def test_a_sparse_step_is_torchs_fused_one_on_each_tensor_once(watched, ours, torchs, settings):
    weights = [nn.Parameter(draw(9, 8, seed=s)) for s in range(3)]
    twins = [nn.Parameter(w.detach().clone()) for w in weights]
    index = [torch.arange(s, 72, 3, dtype=torch.int32) for s in range(3)]
    optimizer = ours(zip(weights, index, strict=True), lr=0.1, **settings)
    assert optimizer.param_groups[0]["fused"]
    peer = torchs(twins, lr=0.1, fused=True, **settings)
    for step in range(3):
        for weight, twin in zip(weights, twins, strict=True):
            weight.grad = draw(9, 8, seed=10 + step)
            twin.grad = weight.grad.clone()
        with watched() as asked:
            optimizer.step()
        assert not asked
        peer.step()
    for weight, twin, places in zip(weights, twins, index, strict=True):
        assert torch.equal(read(weight, places), read(twin, places))


def test_a_user_s_choice_of_torchs_way_stays():
    weight = nn.Parameter(draw(4))
    for settings in ({"foreach": True}, {"fused": False}, {"differentiable": True}):
        group = SparseAdamW([(weight, torch.tensor([1]))], **settings).param_groups[0]
        assert not group["fused"]
        assert settings.items() <= group.items()


def test_chosen_entries(watched):
    weight, index = draw(6, 5), torch.tensor([3, 7, 20], dtype=torch.int32)
    values = read(weight, index).requires_grad_()
    write(weight, index, values)  # the first one asks torch for what it can do
    with watched() as asked:
        write(weight, index, values)
        selected(values, weight, index).square().sum().backward()
    assert not asked
    torch.testing.assert_close(values.grad, 2 * read(weight, index))


class Texts(nn.Module):
    """Embeddings with padding, layers on tokens, norms, and a tied head on the last token."""

    def __init__(self, layers, tied=False):
        super().__init__()
        self.emb = nn.Embedding(13, 6, padding_idx=0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 13, bias=False)
        if tied:
            self.head.weight = self.emb.weight

    def forward(self, ids):
        h = self.emb(ids)
        for layer in self.layers:
            h = h + layer(h).tanh()
        return self.head(self.norm(h))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_bytes", [1 << 26, 600])
def test_fisher_information(watched, tied, max_bytes):
    """A few questions a batch (is the value finite? are rows the samples?), whatever the number of layers."""
    counts = []
    for layers in (2, 5):
        torch.manual_seed(0)
        model, ids = Texts(layers, tied).double(), torch.randint(0, 13, (4, 7))
        ids[0, 3:], ids[1, 2] = 0, ids[1, 1]  # padding, and a token that comes twice

        def forward(model=model, ids=ids):
            return -cross_entropy(model(ids)[:, :-1].mT, ids[:, 1:], reduction="none").sum(1)

        expected = squared_gradients_reference(model, forward)
        with watched() as asked:
            found = squared_gradients(model, forward, samples=4, max_bytes=max_bytes)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-18)
        counts.append(len(asked))
    assert counts[0] == counts[1] <= 4


@pytest.mark.parametrize("threads", [1], indirect=True)  # the profiler sees no helper's memory
def test_fisher_information_takes_hardly_more_memory_than_a_gradient(threads):
    """The gradients at the outputs of all layers never exist at a time."""
    layers = [layer for _ in range(8) for layer in (nn.Linear(32, 32), nn.GELU())]
    model, x = nn.Sequential(*layers), torch.randn(4, 200, 32)

    def value():
        return model(x).square().sum((1, 2))

    def gradient():
        model.zero_grad()
        value().sum().backward()

    activations = 16 * x.nbytes
    plain, ours = (
        transient_bytes(step) for step in (gradient, lambda: squared_gradients(model, value, samples=4))
    )
    assert activations < plain
    assert ours < 1.2 * plain


def on_meta():
    """Each kernel with its gradients, on a device where nothing can be asked and nothing meets another device."""
    yield lora_linear(*lora("meta").values(), 0.5)
    (hidden, weight, bias), labels = head("meta")
    yield linear_cross_entropy(hidden, weight, labels, bias)
    values, weight = (draw(*shape, device="meta").requires_grad_() for shape in ((3,), (6, 5)))
    index = torch.empty(3, dtype=torch.int64, device="meta")
    write(weight.detach(), index, values)
    yield selected(values, weight.detach(), index)
    with recompute_activations():
        x = draw(4, 4, device="meta").requires_grad_()
        yield nn.functional.silu(x + 1) * x


def test_on_the_meta_device(watched):
    with watched() as asked:
        for result in on_meta():
            assert result.is_meta
            result.sum().backward()
    assert not asked


MAKES = {
    f.__name__
    for f in (torch.empty, torch.zeros, torch.ones, torch.full, torch.arange, torch.tensor, torch.rand)
}
MAKES |= {"randn", "randint", "randperm", "linspace", "eye", "as_tensor", "scalar_tensor", "empty_strided"}


def made_without_a_device(source):
    """The lines of calls such as torch.zeros(3)."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and (node.func.value.id, node.func.attr in MAKES) == ("torch", True)
        and not any(keyword.arg == "device" for keyword in node.keywords)
    ]


@pytest.mark.parametrize("file", sorted(Path(kernels.__path__[0]).glob("*.py")), ids=lambda path: path.name)
def test_no_kernel_makes_a_tensor_without_saying_where(file):
    assert made_without_a_device("x = torch.zeros(3)\ny = torch.zeros(3, device=d)") == [1]
    assert not made_without_a_device(file.read_text())
