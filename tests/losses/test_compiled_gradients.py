"""torch.compile changes no gradient of a public loss or module: one that is cut from the graph is zero in silence.

Compiled by the partitioner that inductor uses, but run by PyTorch itself, which is quick to compile.
"""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from bacon_fast import functional
from bacon_fast.integrations.listing import BaConLoss as Listing
from bacon_fast.losses import BaConLoss
from bacon_fast.models.batchnorm import BatchNorm2d, BatchNormAct2d

WITHOUT_GRADIENT = {"balanced_temperatures", "bank_select_", "bank_write_", "class_centers", "sgd_ema_"}
LABELS, UNLABELED = torch.tensor([0, 1, 2, 0, 1, 2]), 8
R, D, K = len(LABELS) + UNLABELED, 7, 3


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bacon(x):
    counts, reliable = torch.tensor([5, 3, 1]), torch.ones(R, dtype=torch.bool)
    logits = numbers(UNLABELED, K, seed=1)
    return functional.bacon_loss(x, LABELS, logits, numbers(K, D, seed=2), reliable, counts, progress=0.5)


def heads(x, y):
    rates, rows = torch.tensor([0.2, 0.5, 1.0]), torch.full((4,), -1)
    out = functional.fixmatch_abc_loss(x, y, LABELS, rows, rates, rates, step=3, seed=1, threshold=0.3)
    return out.supervised + out.unsupervised + out.abc_labeled + out.abc_unlabeled


def norm(x, residual, weight, bias, backend=None):
    options = {"residual": residual, "training": True, "backend": backend}
    activated, total = functional.batch_norm_act(x, weight, bias, torch.zeros(3), torch.ones(3), **options)
    return activated.square().sum() + total.sum()


MANY = torch.arange(R) % 4
CASES = {
    "bacon_loss": (bacon, [(R, D)]),
    "fixmatch_abc_loss": (heads, [(14, K), (14, K)]),
    "batch_norm_act": (norm, [(4, 3, 5, 5), (4, 3, 5, 5), (3,), (3,)]),
    "batch_norm_act by name": (partial(norm, backend="cpp"), [(4, 3, 5, 5), (4, 3, 5, 5), (3,), (3,)]),
    "info_nce": (functional.info_nce, [(R, D), (R, D), (5, D)]),
    "info_nce within the batch": (functional.info_nce, [(R, D), (R, D)]),
    "sscl_loss": (lambda q: functional.sscl_loss(q, numbers(R, 2, D, seed=1), numbers(9, D, seed=2)), [(R, D)]),
    "sup_con_loss": (lambda x: functional.sup_con_loss(x, MANY), [(R, D)]),
    "sup_con_loss with prototypes": (
        lambda x, p: functional.sup_con_loss(x, MANY, prototypes=p, reduction="pml"),
        [(R, D), (K, D)],
    ),
}


def test_every_public_operation_is_covered():
    functions = {name for name in functional.__all__ if not isinstance(getattr(functional, name), type)}
    assert {name.split()[0] for name in CASES} == functions - WITHOUT_GRADIENT


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager_decomp_partition")


def assert_same_gradients(eager, graph, shapes):
    """Each of the two: a function, and the parameters that it uses."""
    found = []
    for function, parameters in (eager, graph):
        leaves = [numbers(*shape, seed=10 + i).requires_grad_() for i, shape in enumerate(shapes)]
        value = function(*leaves)
        found.append((value.detach(), torch.autograd.grad(value, [*leaves, *parameters], materialize_grads=True)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    assert all(gradient.any() for gradient in found[0][1]), "a gradient of zero would prove nothing"


@pytest.mark.parametrize("name", CASES)
def test_functions(name):
    function, shapes = CASES[name]
    assert_same_gradients((function, ()), (compiled(function), ()), shapes)


def call_listing(module, x):
    counts, labels = torch.tensor([5, 3, 1]), torch.cat([LABELS, torch.full((UNLABELED,), -1)])
    confidences = (9 * numbers(R, K, seed=1)).softmax(1)
    with torch.no_grad():
        module(x.detach(), labels, confidences, counts, 1, 10)  # gives the classes centers
    return module(x, labels, confidences, counts, 2, 10)


def call_bacon(module, x):
    slots = torch.arange(len(LABELS)), torch.arange(UNLABELED)
    call = (LABELS, 3 * numbers(R, K, seed=1), *slots)
    with torch.no_grad():
        module(x.detach(), *call, progress=0.1, active=True)
    return module(x, *call, progress=0.2, active=True).loss


def call_norm(module, x):
    return module(x).square().mul(x).sum()


MODULES = {
    "listing": (Listing(K, feature_dim=D), call_listing, (R, D)),
    "BaConLoss": (BaConLoss(D, K, 6, 8, reliable_threshold=0.3, count_threshold=0.3), call_bacon, (R, D)),
    "BatchNorm2d": (BatchNorm2d(3), call_norm, (4, 3, 5, 5)),
    "BatchNormAct2d": (BatchNormAct2d(3), lambda m, x: call_norm(lambda v: m(v)[0], x), (4, 3, 5, 5)),
}


def check_module(module: nn.Module, call, shape) -> None:
    twin = copy.deepcopy(module)
    eager = (lambda x: call(module, x), list(module.parameters()))
    assert_same_gradients(eager, (compiled(lambda x: call(twin, x)), list(twin.parameters())), [shape])


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    check_module(*MODULES[name])


@pytest.mark.parametrize(
    ("name", "backend", "memory"),
    [
        ("SupConLoss", None, False),
        ("NTXentLoss", None, False),
        ("NTXentLoss", "reference", False),
        ("NTXentLoss", None, True),
    ],
)
def test_drop_ins(name, backend, memory):
    ours = pytest.importorskip("bacon_fast.integrations.metric_learning")
    loss = getattr(ours, name)(temperature=0.5, backend=backend)

    if memory:
        loss = ours.CrossBatchMemory(loss, D, memory_size=2 * R)
        loss(numbers(R, D, seed=5), MANY)
    check_module(loss, lambda module, x: module(x, MANY), (R, D))
