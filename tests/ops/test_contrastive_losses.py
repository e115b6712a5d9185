"""SupCon, SSC, InfoNCE, SsCL and BaCon through every backend of the family, against oracles outside the package."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import NTXentLoss, SupConLoss
from pytorch_metric_learning.reducers import DoNothingReducer

from bacon_fast import functional
from bacon_fast.functional import class_centers, info_nce, sscl_loss, sup_con_loss
from bacon_fast.kernels import contrastive_backward, contrastive_forward
from bacon_fast.ops import backends

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("bacon_*.npz"))


def backend_parameter(name: str):
    reason = backends.BACKENDS["contrastive"][name].why_not(torch.empty(1, 1))
    return pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))


TRITON = pytest.mark.parametrize("backend", [backend_parameter("triton")])
EVERY = pytest.mark.parametrize("backend", [backend_parameter(name) for name in ("reference", "cpp", "triton")])


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def normal(generator, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_same(found, expected, leaves, rtol=1e-11):
    """Equal values and gradients."""
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)
    wanted = torch.autograd.grad(expected, leaves, retain_graph=True)
    for a, b in zip(torch.autograd.grad(found, leaves, retain_graph=True), wanted):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.abs().max().item())


# SupCon and SSC


def sup_con_rows(embeddings, labels, temperature=0.1):
    """Row losses and numbers of positives, from the matrix of similarities."""
    s = F.normalize(embeddings, dim=1) @ F.normalize(embeddings, dim=1).T / temperature
    other = ~torch.eye(len(labels), dtype=torch.bool)
    positive = (labels[:, None] == labels) & other
    log_sum = s.masked_fill(~other, -math.inf).logsumexp(dim=1)
    count = positive.sum(dim=1)
    return torch.where(count > 0, log_sum - (positive * s).sum(dim=1) / count.clamp_min(1), 0), count


@EVERY
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_sup_con_equals_pytorch_metric_learning(backend, generator, temperature):
    features = normal(generator, 45, 12).requires_grad_()
    labels = torch.randint(0, 12, (45,), generator=generator)
    found = sup_con_loss(features, labels, temperature=temperature, reduction="pml", backend=backend)
    assert_same(found, SupConLoss(temperature=temperature)(features, labels), [features])


@EVERY
def test_ssc_with_prototypes_weights_and_unique_labels(backend, generator):
    num_classes, batch, unlabeled, dim = 30, 8, 20, 16
    prototypes = normal(generator, num_classes, dim).requires_grad_()
    features = normal(generator, batch + 2 * unlabeled, dim).requires_grad_()
    pseudo = torch.randint(0, num_classes, (unlabeled,), generator=generator)
    confident = torch.rand(unlabeled, generator=generator) < 0.5
    of_sample = torch.where(confident, pseudo, num_classes + torch.arange(unlabeled))
    labels = torch.cat([torch.randint(0, 3, (batch,), generator=generator), of_sample, of_sample])
    weights = torch.cat([torch.ones(batch), torch.where(confident, 1.0, 0.2).repeat(2)]).double()

    all_labels = torch.cat([torch.arange(num_classes), labels])
    all_weights = torch.cat([torch.full((num_classes,), 0.5), weights]).double()
    rows, count = sup_con_rows(torch.cat([prototypes, features]), all_labels)
    assert (count == 0).any()
    options = {"prototypes": prototypes, "weights": weights, "prototype_weight": 0.5, "backend": backend}
    valid = count > 0
    leaves = [prototypes, features]
    expected = (all_weights * rows)[valid].sum() / all_weights[valid].sum()
    assert_same(sup_con_loss(features, labels, **options), expected, leaves)
    expected = (all_weights * rows).sum() * len(rows) / (all_weights.sum() * valid.sum())
    assert_same(sup_con_loss(features, labels, reduction="pml", **options), expected, leaves)
    each = sup_con_loss(features, labels, reduction="none", **options)
    torch.testing.assert_close(each, all_weights * rows, rtol=1e-11, atol=1e-12)

    # The authors gather confident and unconfident rows apart; the order of the rows makes no difference.
    order = torch.randperm(len(labels), generator=generator)
    shuffled = sup_con_loss(features[order], labels[order], **(options | {"weights": weights[order]}))
    torch.testing.assert_close(shuffled, sup_con_loss(features, labels, **options), rtol=1e-12, atol=0)


@EVERY
def test_sup_con_without_a_term_is_zero(backend, generator):
    features = normal(generator, 7, 4).requires_grad_()
    same, distinct = torch.zeros(7, dtype=torch.long), torch.arange(7)
    pairs = torch.tensor([0, 0, 1, 1, 2, 3, 4])
    cases = [
        sup_con_loss(features, distinct, backend=backend),
        sup_con_loss(features, distinct, reduction="pml", backend=backend),
        sup_con_loss(features, same, reduction="pml", backend=backend),
        sup_con_loss(features, pairs, weights=torch.zeros(7), backend=backend),
        sup_con_loss(features, pairs, weights=torch.zeros(7), reduction="pml", backend=backend),
        sup_con_loss(features[:0], same[:0], backend=backend),
        sup_con_loss(features[:0], same[:0], reduction="pml", backend=backend),
        sup_con_loss(features[:1], same[:1], backend=backend),
    ]
    for loss in cases:
        (gradient,) = torch.autograd.grad(loss, features)
        assert loss.item() == 0 and torch.equal(gradient, torch.zeros_like(features))
    assert sup_con_loss(features, same, backend=backend) > 0  # only "pml" wants a negative pair


@EVERY
def test_a_converged_pair_counts_in_the_mean(backend):
    """A loss that rounds to 0 in float32 is not the loss of a row without positive."""
    features = torch.tensor([[1.0, 0], [1, 0], [-1, 0], [-1, 0], [0, 1]])
    labels = torch.tensor([0, 0, 1, 1, 2])
    loss = sup_con_loss(features, labels, temperature=0.02, backend=backend)
    assert loss < 1e-12
    weights = torch.tensor([1.0, 1, 0, 0, 0])
    loss = sup_con_loss(features, labels, weights=weights, temperature=0.5, backend=backend)
    expected = math.log(1 + 2 * math.exp(-4) + math.exp(-2))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


# InfoNCE


@EVERY
def test_info_nce_with_a_queue_is_a_cross_entropy(backend, generator):
    queries, positives = (normal(generator, 21, 10).requires_grad_() for _ in range(2))
    queue = normal(generator, 75, 10).requires_grad_()
    q, k, n = (F.normalize(x, dim=1) for x in (queries, positives, queue))
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ n.T], dim=1) / 0.07
    target = torch.zeros(21, dtype=torch.long)
    for leaves in ([queries, positives, queue], [queries, positives]):  # a queue that needs no gradient: one pass
        negatives = queue if len(leaves) == 3 else queue.detach()
        found = info_nce(queries, positives, negatives, temperature=0.07, backend=backend)
        assert_same(found, F.cross_entropy(logits, target), leaves)
    found = info_nce(queries, positives, queue, temperature=0.07, reduction="none", backend=backend)
    torch.testing.assert_close(found, F.cross_entropy(logits, target, reduction="none"), rtol=1e-11, atol=1e-12)


@EVERY
def test_info_nce_within_the_batch(backend, generator):
    queries, positives = (normal(generator, 19, 10).requires_grad_() for _ in range(2))
    logits = F.normalize(queries, dim=1) @ F.normalize(positives, dim=1).T / 0.1
    expected = F.cross_entropy(logits, torch.arange(19))
    assert_same(info_nce(queries, positives, backend=backend), expected, [queries, positives])
    # pytorch-metric-learning's NTXentLoss takes both directions, and the negatives of one direction from both sides.
    pairs, labels = torch.cat([queries, positives]), torch.arange(19).repeat(2)
    both = torch.stack(
        [
            info_nce(
                pairs[[i]],
                pairs[[(i + 19) % 38]],
                pairs[[j for j in range(38) if j % 19 != i % 19]],
                backend=backend,
            )
            for i in (0, 7, 25)
        ]
    )
    expected = NTXentLoss(temperature=0.1, reducer=DoNothingReducer())(pairs, labels)["loss"]
    assert expected["indices"][0].tolist() == list(range(38))
    torch.testing.assert_close(both, expected["losses"][[0, 7, 25]], rtol=1e-9, atol=1e-11)


@EVERY
def test_info_nce_of_half_precision_queries_beside_a_float_queue(backend, generator):
    queries, positives = (normal(generator, 9, 8, dtype=torch.bfloat16) for _ in range(2))
    queue = normal(generator, 30, 8, dtype=torch.float32)
    loss = info_nce(queries.requires_grad_(), positives, queue, backend=backend)
    loss.backward()
    expected = info_nce(queries.double(), positives.double(), queue.double(), backend="reference")
    assert loss.dtype == torch.float32 and queries.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


@EVERY
def test_info_nce_of_nothing(backend):
    queries = torch.zeros(0, 4, requires_grad=True)
    loss = info_nce(queries, torch.zeros(0, 4), torch.randn(3, 4), backend=backend)
    assert loss.item() == 0
    loss.backward()
    queries = torch.randn(3, 4, requires_grad=True)
    loss = info_nce(queries, torch.randn(3, 4), torch.zeros(0, 4), backend=backend)
    (gradient,) = torch.autograd.grad(loss, queries)
    assert loss.item() == 0 and torch.equal(gradient, torch.zeros_like(queries))


# SsCL


@EVERY
@pytest.mark.parametrize("form", ["prod", "sum"])
def test_sscl_equals_its_equation(backend, generator, form):
    gamma, margin = 5.0, -0.25
    queries, queue = normal(generator, 23, 8).requires_grad_(), normal(generator, 70, 8)
    keys = normal(generator, 23, 4, 8)
    alpha = torch.rand(23, 4, generator=generator, dtype=torch.float64)
    mask = torch.rand(23, 4, generator=generator) < 0.6
    mask[:, 0], mask[5] = True, False  # query 5 has no key at all
    query_classes = torch.randint(0, 4, (23,), generator=generator)
    queue_classes = torch.randint(0, 4, (70,), generator=generator)
    positive = gamma * alpha * (F.normalize(queries, dim=1)[:, None] * F.normalize(keys, dim=2)).sum(dim=2)
    negative = (gamma * (F.normalize(queries, dim=1) @ F.normalize(queue, dim=1).T + margin)).exp()
    by_class = {"query_classes": query_classes, "queue_classes": queue_classes}
    other_class = query_classes[:, None] != queue_classes
    has_key = mask.any(dim=1)
    for total, classes in ((negative.sum(dim=1), {}), ((negative * other_class).sum(dim=1), by_class)):
        if form == "prod":
            each = (1 + total * (mask * (-positive).exp()).sum(dim=1)).log()
        else:
            each = (1 + total / (mask * positive.exp()).sum(dim=1)).log()
        options = {"alpha": alpha, "key_mask": mask, "gamma": gamma, "margin": margin, "form": form} | classes
        found = sscl_loss(queries, keys, queue, reduction="none", backend=backend, **options)
        assert found[5] == 0
        torch.testing.assert_close(found[has_key], each[has_key], rtol=1e-11, atol=1e-12)
        mean = sscl_loss(queries, keys, queue, backend=backend, **options)
        torch.testing.assert_close(mean, found.mean(), rtol=1e-12, atol=0)
        (gradient,) = torch.autograd.grad(mean * len(queries), queries)
        (expected,) = torch.autograd.grad(each, queries, has_key.double(), retain_graph=True)
        torch.testing.assert_close(gradient[has_key], expected[has_key], rtol=1e-9, atol=1e-12)
        assert torch.equal(gradient[5], torch.zeros(8, dtype=torch.float64))


@EVERY
def test_sscl_forms_agree_for_one_positive_and_only_then(backend, generator):
    queries, keys, queue = normal(generator, 9, 6), normal(generator, 9, 3, 6), normal(generator, 40, 6)
    one = [sscl_loss(queries, keys[:, :1], queue, form=form, backend=backend) for form in ("prod", "sum")]
    torch.testing.assert_close(one[0], one[1], rtol=1e-12, atol=0)
    prod, plain = (
        sscl_loss(queries, keys, queue, form=form, reduction="none", backend=backend) for form in ("prod", "sum")
    )
    assert (prod > plain).all()
    repeated = keys[:, :1].expand(-1, 4, -1)  # of equal positives, N / P is multiplied by the square of their number
    prod, plain = (
        sscl_loss(queries, repeated, queue, form=form, reduction="none", backend=backend) for form in ("prod", "sum")
    )
    torch.testing.assert_close(prod.expm1(), 16 * plain.expm1(), rtol=1e-10, atol=0)


@EVERY
def test_sscl_gives_keys_and_queue_no_gradient(backend, generator):
    queries, keys, queue = (normal(generator, *s).requires_grad_() for s in ((4, 6), (4, 2, 6), (9, 6)))
    sscl_loss(queries, keys, queue, backend=backend).backward()
    assert queries.grad is not None and keys.grad is None and queue.grad is None


@EVERY
def test_autocast_does_not_round_the_similarities(backend, generator):
    queries, keys, queue = (normal(generator, *s, dtype=torch.float32) for s in ((9, 24), (9, 2, 24), (30, 24)))
    calls = (
        lambda q: sup_con_loss(q, torch.arange(9) % 3, backend=backend),
        lambda q: info_nce(q, keys[:, 0], queue, backend=backend),
        lambda q: sscl_loss(q, keys, queue, backend=backend),
    )
    for call in calls:
        plain, mixed = queries.clone().requires_grad_(), queries.clone().requires_grad_()
        call(plain).backward()
        with torch.autocast("cpu", torch.bfloat16):
            loss = call(mixed)
        loss.backward()
        torch.testing.assert_close(mixed.grad, plain.grad, rtol=1e-6, atol=1e-8)


# BaCon


@pytest.fixture
def large_tiles(monkeypatch):
    """Fewer tiles, so that Triton's interpreter gets through the golden vectors in time."""
    for module in (contrastive_forward, contrastive_backward):
        choose = module.tile_config
        monkeypatch.setattr(
            module, "tile_config", lambda *a, choose=choose: replace(choose(*a), block_resident=128, block_streamed=128)
        )


@EVERY
@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden_vectors(backend, path, large_tiles):
    data = np.load(path)
    for dtype, relative, absolute in ((torch.float64, 1e-12, 1e-12), (torch.float32, 3e-6, 3e-7)):
        features = torch.from_numpy(data["features"]).to(dtype).requires_grad_()
        arguments = [
            features,
            torch.from_numpy(data["labels"]),
            torch.from_numpy(data["logits"]).to(dtype),
            torch.from_numpy(data["centers"]).to(dtype),
            torch.from_numpy(data["selected"]),
            torch.from_numpy(data["class_freq"]).to(dtype),
        ]
        options = {
            "progress": float(data["step"] / data["total_steps"]),
            "temperature": float(data["tau"]),
            "bta": float(data["eta"]),
            "negative_weight": float(data["neg_weight"]),
            "top_k": int(data["top_k"]),
        }
        loss = functional.bacon_loss(*arguments, **options, backend=backend)
        (gradient,) = torch.autograd.grad(loss, features)
        assert loss.dtype == gradient.dtype == dtype
        assert loss.item() == pytest.approx(data["loss_class_mean"].item(), rel=relative, abs=0)
        assert np.abs(gradient.double().numpy() - data["grad_class_mean"]).max() <= absolute


def bacon_batch(generator, batch=9, unlabeled=25, num_classes=6, dim=7, dtype=torch.float64):
    rows = batch + unlabeled
    return {
        "features": normal(generator, rows, dim, dtype=dtype),
        "labels": torch.randint(0, num_classes - 1, (batch,), generator=generator),
        "logits": normal(generator, unlabeled, num_classes, dtype=dtype) * 3,
        "centers": normal(generator, num_classes, dim, dtype=dtype),
        "reliable": torch.rand(rows, generator=generator) < 0.6,
        "class_counts": torch.randint(0, 50, (num_classes,), generator=generator),
    }


@TRITON
@pytest.mark.parametrize("neg_mode", ["authors", "paper"])
@pytest.mark.parametrize("negative_weight", [64.0, None])
@pytest.mark.parametrize("top_k", [1, 3, 9])
def test_bacon_over_the_family(backend, generator, neg_mode, negative_weight, top_k):
    """Modes, classes without a center, NaN in what is not used: against the reference of the loss itself."""
    batch = bacon_batch(generator)
    has_center = torch.tensor([True, True, False, True, True, True])
    batch["centers"][2] = torch.nan
    options = {
        "progress": torch.tensor(0.25, dtype=torch.float64),
        "negative_weight": negative_weight,
        "neg_mode": neg_mode,
        "top_k": top_k,
        "has_center": has_center,
        "bta": 0.5,
    }
    features = batch.pop("features").requires_grad_()
    found = functional.bacon_loss(features, *batch.values(), **options, backend=backend)
    expected = functional.bacon_loss(features, *batch.values(), **options, backend="reference")
    assert_same(found, expected, [features])


@TRITON
@pytest.mark.parametrize("neg_mode", ["authors", "paper"])
def test_bacon_over_the_family_with_nothing_to_learn(backend, generator, neg_mode):
    batch = bacon_batch(generator)
    batch["reliable"].zero_()
    batch["features"][0] = torch.nan
    features = batch.pop("features").requires_grad_()
    loss = functional.bacon_loss(features, *batch.values(), progress=0.0, neg_mode=neg_mode, backend=backend)
    (gradient,) = torch.autograd.grad(loss, features)
    assert loss.item() == 0 and torch.equal(gradient, torch.zeros_like(gradient))


@TRITON
def test_bacon_over_the_family_compiles_to_one_graph(backend, generator):
    batch = bacon_batch(generator, dtype=torch.float32)
    features = batch.pop("features").requires_grad_()

    def loss(features):
        return functional.bacon_loss(features, *batch.values(), progress=0.5, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same(compiled(features), loss(features), [features], rtol=1e-6)


# Class centers


def test_class_centers(generator):
    bank = normal(generator, 50, 5, dtype=torch.float32)
    labels = torch.randint(-1, 4, (50,), generator=generator)
    written = torch.rand(50, generator=generator) < 0.7
    labels[labels == 2] = 3
    bank[~written] = torch.nan
    centers, has_center = class_centers(bank, labels, 5, written)
    assert has_center.tolist() == [True, True, False, True, False]
    for c in range(5):
        of_class = bank[written & (labels == c)]
        expected = of_class.double().mean(dim=0).float() if len(of_class) else torch.zeros(5)
        torch.testing.assert_close(centers[c], expected, rtol=1e-6, atol=1e-7)
    order = torch.randperm(50, generator=generator)
    assert torch.equal(class_centers(bank[order], labels[order], 5, written[order])[0], centers)
    whole, _ = class_centers(torch.ones(3, 2), torch.tensor([0, 0, 1]), 2)
    assert torch.equal(whole, torch.ones(2, 2))


# Errors


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x, y: sup_con_loss(x[0], y), ValueError, r"features: expected shape \[N, D\], found \[6\]"),
        (lambda x, y: sup_con_loss(x, y[1:]), ValueError, r"labels: expected shape \[4\], found \[3\]"),
        (lambda x, y: sup_con_loss(x, y.float()), TypeError, "labels: expected dtype int64, found torch.float32"),
        (lambda x, y: sup_con_loss(x, y, prototypes=x[:, 1:]), ValueError, r"prototypes: expected shape \[K, 6\]"),
        (lambda x, y: sup_con_loss(x, y, weights=x), ValueError, r"weights: expected shape \[4\], found \[4, 6\]"),
        (lambda x, y: sup_con_loss(x, y, temperature=0), ValueError, "temperature: expected a number > 0, found 0"),
        (lambda x, y: sup_con_loss(x, y, reduction="sum"), ValueError, "reduction: expected one of wmean, pml, none"),
        (lambda x, y: sup_con_loss(x, y, weights=y.float().to("meta")), ValueError, "weights: expected device cpu"),
        (lambda x, y: info_nce(x, x[1:]), ValueError, r"positives: expected shape \[4, 6\], found \[3, 6\]"),
        (lambda x, y: info_nce(x, x, x[:, 1:]), ValueError, r"negatives: expected shape \[C, 6\], found \[4, 5\]"),
        (lambda x, y: info_nce(x, x, y[:, None].expand(4, 6)), TypeError, "negatives: expected dtype float"),
        (lambda x, y: info_nce(x, x, reduction="sum"), ValueError, "reduction: expected one of mean, none"),
        (lambda x, y: sscl_loss(x, x, x), ValueError, r"keys: expected shape \[4, P, 6\], found \[4, 6\]"),
        (lambda x, y: sscl_loss(x, x[:, None], x, form="mean"), ValueError, "form: expected one of prod, sum"),
        (lambda x, y: sup_con_loss(x, y - 9), ValueError, r"labels: expected values in 0\.\.2\^31-1, found -"),
        (lambda x, y: sup_con_loss(x, y + 2**31), ValueError, r"labels: expected values in 0\.\.2\^31-1, found 214"),
        (lambda x, y: sscl_loss(x, x[:, None], x, query_classes=y), ValueError, "expected both or neither"),
        (
            lambda x, y: sscl_loss(x, x[:, None], x, query_classes=y - 9, queue_classes=y),
            ValueError, r"query_classes: expected values in 0\.\.2\^31-1, found -",
        ),
        (
            lambda x, y: sscl_loss(x, x[:, None], x, query_classes=y, queue_classes=y - 9),
            ValueError, r"queue_classes: expected values in -1\.\.2\^31-1, found -",
        ),
        (lambda x, y: sscl_loss(x, x[:, None], x, key_mask=x[:, :1]), TypeError, "key_mask: expected dtype bool"),
        (lambda x, y: sscl_loss(x, x[:, None], x, gamma=math.nan), ValueError, "gamma: expected a number > 0"),
        (lambda x, y: class_centers(x, y, 0), ValueError, "num_classes: expected a positive integer, found 0"),
        (lambda x, y: class_centers(x, y + 9, 2), ValueError, r"labels: expected classes in 0\.\.1, or -1, found"),
        (lambda x, y: class_centers(x, y - 9, 2), ValueError, r"labels: expected classes in 0\.\.1, or -1, found"),
        (lambda x, y: class_centers(x, y, 2, written=y), TypeError, "written: expected dtype bool"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(4, 6), torch.tensor([0, 1, 0, 1]))


def test_an_unusable_backend_is_an_error():
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run contrastive here: it serves"):
        info_nce(torch.randn(2, 600), torch.randn(2, 600), backend="triton")
    with pytest.raises(
        ValueError, match="backend: expected None or one of reference, cpp, triton, chunks, cuda, found 'numpy'"
    ):
        info_nce(torch.randn(2, 6), torch.randn(2, 6), backend="numpy")
