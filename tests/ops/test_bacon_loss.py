"""`functional.bacon_loss` against golden vectors, a loop oracle and gradcheck; every failure mode of methods.md E.6."""

from pathlib import Path

import bacon_oracle
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bacon_oracle import random_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from bacon_fast import functional
from bacon_fast.functional import bacon_loss
from bacon_fast.ops import backends

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("bacon_*.npz"))
MODES = ["authors", "paper"]
BACKENDS = [name for name, b in backends.BACKENDS["bacon_loss"].items() if b.why_not(torch.empty(1, 1)) is None]


def loss_and_gradient(arguments, **options):
    features = arguments[0].clone().requires_grad_()
    loss = bacon_loss(features, *arguments[1:], **options)
    (gradient,) = torch.autograd.grad(loss, features)
    return loss.detach(), gradient


def oracle_and_gradient(arguments, **options):
    features = arguments[0].clone().requires_grad_()
    loss = bacon_oracle.bacon_loss(features, *arguments[1:], **options)
    if not loss.requires_grad:
        return loss, torch.zeros_like(features)
    (gradient,) = torch.autograd.grad(loss, features)
    return loss.detach(), gradient


def assert_matches_oracle(arguments, **options):
    loss, gradient = loss_and_gradient(arguments, **options)
    expected_loss, expected_gradient = oracle_and_gradient(arguments, **options)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_vectors(path, dtype):
    data = np.load(path)
    arguments = [
        torch.from_numpy(data["features"]).to(dtype),
        torch.from_numpy(data["labels"]),
        torch.from_numpy(data["logits"]).to(dtype),
        torch.from_numpy(data["centers"]).to(dtype),
        torch.from_numpy(data["selected"]),
        torch.from_numpy(data["class_freq"]).to(dtype),
    ]
    loss, gradient = loss_and_gradient(
        arguments,
        progress=float(data["step"] / data["total_steps"]),
        temperature=float(data["tau"]),
        bta=float(data["eta"]),
        negative_weight=float(data["neg_weight"]),
        top_k=int(data["top_k"]),
        neg_mode="authors",
    )
    relative, absolute = (1e-12, 1e-12) if dtype == torch.float64 else (3e-6, 3e-7)
    assert loss.dtype == gradient.dtype == dtype
    assert loss.item() == pytest.approx(data["loss_class_mean"].item(), rel=relative, abs=0)
    assert np.abs(gradient.double().numpy() - data["grad_class_mean"]).max() <= absolute


def test_all_golden_vectors_are_there():
    assert len(GOLDEN) == 22


@pytest.mark.parametrize("neg_mode", MODES)
@pytest.mark.parametrize("top_k", [1, 2, 3, 9])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"batch": 1, "unlabeled": 5, "num_classes": 4, "dim": 1},
        {"batch": 0, "unlabeled": 9},
        {"batch": 9, "unlabeled": 0},
        {"batch": 5, "unlabeled": 8, "num_classes": 2},
        {"batch": 5, "unlabeled": 8, "num_classes": 3},
        {"batch": 6, "unlabeled": 7, "num_classes": 40, "dim": 3},
        {"select": 0.1},
    ],
    ids=str,
)
def test_against_the_class_loop(sizes, top_k, neg_mode):
    assert_matches_oracle(random_batch(**sizes), progress=0.3, bta=0.4, top_k=top_k, neg_mode=neg_mode)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 5),
    unlabeled=st.integers(0, 6),
    num_classes=st.integers(1, 6),
    top_k=st.integers(1, 6),
    neg_mode=st.sampled_from(MODES),
    weight=st.sampled_from([None, 1.0, 64.0]),
    missing=st.sets(st.integers(0, 5)),
    progress=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_any_codes_and_masks(batch, unlabeled, num_classes, top_k, neg_mode, weight, missing, progress, seed):
    arguments = random_batch(batch, unlabeled, num_classes, 3, seed)
    has_center = torch.tensor([c not in missing for c in range(num_classes)])
    assert_matches_oracle(
        arguments,
        progress=progress,
        top_k=top_k,
        neg_mode=neg_mode,
        negative_weight=weight,
        has_center=has_center,
    )


@pytest.mark.parametrize("neg_mode", MODES)
def test_gradcheck(neg_mode):
    features, *rest = random_batch(4, 8, 4, 3)
    assert torch.autograd.gradcheck(
        lambda f: bacon_loss(f, *rest, progress=0.5, neg_mode=neg_mode), features.requires_grad_()
    )


def test_only_the_features_receive_a_gradient():
    features, labels, logits, centers, reliable, counts = random_batch()
    leaves = [tensor.clone().requires_grad_() for tensor in (features, logits, centers, counts)]
    bacon_loss(leaves[0], labels, leaves[1], leaves[2], reliable, leaves[3].detach(), progress=0.1).backward()
    assert leaves[0].grad.abs().sum() > 0
    assert leaves[1].grad is None and leaves[2].grad is None


# ---- methods.md E.6: what must not break the loss ----


@pytest.mark.parametrize("neg_mode", MODES)
def test_class_without_a_center_has_no_term(neg_mode):
    arguments = random_batch()
    has_center = torch.tensor([True, False, True, True, False])
    arguments[3][~has_center] = float("nan")
    assert_matches_oracle(arguments, progress=0.5, neg_mode=neg_mode, has_center=has_center)
    assert loss_and_gradient(arguments, progress=0.5, neg_mode=neg_mode, has_center=has_center)[1].isfinite().all()


@pytest.mark.parametrize("neg_mode", MODES)
def test_no_center_at_all_gives_exactly_zero(neg_mode):
    arguments = random_batch()
    loss, gradient = loss_and_gradient(
        arguments, progress=0.5, neg_mode=neg_mode, has_center=torch.zeros(5, dtype=torch.bool)
    )
    assert loss == 0 and not gradient.any()


@pytest.mark.parametrize("neg_mode", MODES)
def test_nan_center_of_a_class_with_only_unreliable_rows(neg_mode):
    """The released function returns NaN here."""
    arguments = random_batch(num_classes=3)
    classes = torch.cat([arguments[1], arguments[2].argmax(1)])
    arguments[4] &= classes != 1
    arguments[3][1] = float("nan")
    loss, gradient = loss_and_gradient(arguments, progress=0.5, neg_mode=neg_mode, top_k=1)
    assert loss > 0 and gradient.isfinite().all()
    assert_matches_oracle(arguments, progress=0.5, neg_mode=neg_mode, top_k=1)


@pytest.mark.parametrize("neg_mode", MODES)
def test_class_without_a_negative_has_no_term(neg_mode):
    """All rows may be of class 0, so its anchors have no negative; the released function returns NaN."""
    arguments = random_batch(batch=2, unlabeled=8, num_classes=4)
    arguments[1][:] = torch.tensor([0, 0])
    arguments[2][:, 0] = 5.0  # class 0 is the likeliest of four rows, and among the three likeliest of all
    arguments[2][4:, 1] = 9.0
    arguments[4][:] = True
    loss, gradient = loss_and_gradient(arguments, progress=0.5, neg_mode=neg_mode)
    assert loss > 0 and gradient.isfinite().all()
    assert_matches_oracle(arguments, progress=0.5, neg_mode=neg_mode)


@pytest.mark.parametrize("neg_mode", MODES)
@pytest.mark.parametrize("top_k", [1, 3])
def test_one_class_has_no_negatives_and_no_loss(neg_mode, top_k):
    arguments = random_batch(num_classes=1)
    loss, gradient = loss_and_gradient(arguments, progress=0.5, neg_mode=neg_mode, top_k=top_k)
    assert loss == 0 and not gradient.any()


@pytest.mark.parametrize("neg_mode", MODES)
def test_nothing_reliable_gives_exactly_zero(neg_mode):
    arguments = random_batch()
    arguments[4][:] = False
    loss, gradient = loss_and_gradient(arguments, progress=0.5, neg_mode=neg_mode)
    assert loss == 0 and not gradient.any()


@pytest.mark.parametrize("neg_mode", MODES)
def test_empty_batch_gives_exactly_zero(neg_mode):
    loss, gradient = loss_and_gradient(random_batch(batch=0, unlabeled=0), progress=0.5, neg_mode=neg_mode)
    assert loss == 0 and gradient.shape == (0, 6)


def batch_with_unused_rows():
    """Only class 1 has a term, by row 1. Row 5 is of class 2 and may be of class 1: neither anchor nor negative."""
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(6, 4, generator=g, dtype=torch.float64),
        torch.tensor([1, 1, 0, 2]),
        torch.tensor([[3.0, 0.0, 2.0], [0.0, 2.0, 3.0]], dtype=torch.float64),
        torch.randn(3, 4, generator=g, dtype=torch.float64),
        torch.tensor([False, True, False, False, False, False]),
        torch.ones(3),
    ]


# In the authors' form row 0 enters the mean of class 1 though it is not reliable.
@pytest.mark.parametrize("neg_mode, unused", [("authors", [5]), ("paper", [0, 5])])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_in_a_row_that_takes_no_part(neg_mode, unused, poison):
    arguments = batch_with_unused_rows()
    expected_loss, expected_gradient = loss_and_gradient(arguments, progress=0.5, neg_mode=neg_mode, top_k=2)
    assert expected_loss > 0 and not expected_gradient[unused].any()
    arguments[0][unused] = poison
    loss, gradient = loss_and_gradient(arguments, progress=0.5, neg_mode=neg_mode, top_k=2)
    assert torch.equal(loss, expected_loss) and torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("neg_mode", MODES)
@pytest.mark.parametrize("row", [1, 2, 3, 4])
def test_nan_in_a_row_that_takes_part_is_not_hidden(neg_mode, row):
    arguments = batch_with_unused_rows()
    arguments[0][row, 0] = float("nan")
    assert loss_and_gradient(arguments, progress=0.5, neg_mode=neg_mode, top_k=2)[0].isnan()


@pytest.mark.parametrize("neg_mode", MODES)
def test_counts_of_zero_leave_the_temperature_alone(neg_mode):
    arguments = random_batch()
    arguments[5][:] = 0
    loss, _ = loss_and_gradient(arguments, progress=0.0, bta=0.5, neg_mode=neg_mode)
    expected, _ = loss_and_gradient(arguments, progress=0.0, bta=0.0, neg_mode=neg_mode)
    assert torch.equal(loss, expected)


def test_zero_vectors_have_no_direction_and_no_nan():
    arguments = random_batch()
    arguments[0][[0, 9]] = 0
    arguments[3][2] = 0
    loss, gradient = loss_and_gradient(arguments, progress=0.5)
    assert loss.isfinite() and gradient.isfinite().all()


# ---- numerics and calling conventions ----


def test_invariant_to_the_length_of_vectors():
    arguments = random_batch()
    loss, _ = loss_and_gradient(arguments, progress=0.5)
    arguments[0] = arguments[0] * torch.logspace(-3, 3, len(arguments[0]), dtype=torch.float64)[:, None]
    arguments[3] = arguments[3] * 1e3
    torch.testing.assert_close(loss_and_gradient(arguments, progress=0.5)[0], loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("neg_mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype, neg_mode):
    arguments = [t.to(dtype) if t.is_floating_point() else t for t in random_batch(20, 40, 10, 16)]
    upcast = [t.float() if t.is_floating_point() else t for t in arguments]
    loss, gradient = loss_and_gradient(arguments, progress=0.5, neg_mode=neg_mode)
    expected_loss, expected_gradient = loss_and_gradient(upcast, progress=0.5, neg_mode=neg_mode)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.equal(loss, expected_loss)
    assert torch.equal(gradient, expected_gradient.to(dtype))


def test_autocast_does_not_round_the_similarities():
    arguments = [t.float() if t.is_floating_point() else t for t in random_batch(20, 40, 10, 16)]
    expected = bacon_loss(*arguments, progress=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bacon_loss(*arguments, progress=0.5), expected)


def test_non_contiguous_arguments():
    arguments = random_batch()
    expected = loss_and_gradient(arguments, progress=0.5)
    strided = [torch.stack([t, t], dim=-1)[..., 0] for t in arguments]
    assert not any(t.is_contiguous() for t in strided)
    found = loss_and_gradient(strided, progress=0.5)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)


def test_progress_as_a_tensor():
    arguments = random_batch()
    expected = bacon_loss(*arguments, progress=0.25, bta=0.7)
    assert torch.equal(bacon_loss(*arguments, progress=torch.tensor(0.25, dtype=torch.float64), bta=0.7), expected)


def test_upstream_gradient_scales_the_gradient():
    arguments = random_batch()
    features = arguments[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(-2.5 * bacon_loss(features, *arguments[1:], progress=0.5), features)
    torch.testing.assert_close(gradient, -2.5 * loss_and_gradient(arguments, progress=0.5)[1])


def test_blog_parameters_are_a_cross_entropy_over_positive_and_negatives():
    """The blog variant (methods.md E.9): sum of the negatives, temperature 0.5, that of a positive never below 0.1."""
    features, labels, logits, centers, reliable, counts = random_batch(batch=10, unlabeled=30, num_classes=6)
    unit, unit_centers = F.normalize(features), F.normalize(centers)
    tau = (0.5 * (1 - 0.9**2 * (counts / counts.max()).sqrt())).clamp_min(0.1)
    assert (tau == 0.1).any() and (tau > 0.1).any()
    top = logits.topk(3).indices
    classes = torch.cat([labels, top[:, 0]])
    losses = []
    for r in reliable.nonzero().flatten():
        c = classes[r]
        negative = torch.cat([labels != c, (top != c).all(1)])
        row = torch.cat([(unit[r] @ unit_centers[c] / tau[c])[None], unit[negative] @ unit[r] / 0.5])
        losses.append(F.cross_entropy(row[None], torch.tensor([0])))
    loss = bacon_loss(
        features,
        labels,
        logits,
        centers,
        reliable,
        counts,
        progress=0.1,
        temperature=0.5,
        bta=1.0,
        negative_weight=None,
        neg_mode="paper",
        min_temperature=0.1,
    )
    # The 1e-8 inside the logarithm is all that differs.
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-7, atol=0)


def test_balanced_temperatures():
    counts = torch.tensor([1000, 250, 10, 0])
    found = functional.balanced_temperatures(counts, progress=0.5, temperature=0.1, bta=0.4)
    expected = [0.1 * (1 - 0.4 * 0.25 * share) for share in (1, 0.5, 0.1, 0)]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert (functional.balanced_temperatures(counts, progress=0.0, bta=1.0, min_temperature=0.03) >= 0.03).all()
    assert functional.balanced_temperatures(counts.double(), progress=1.0).tolist() == [0.1] * 4


# ---- errors ----


def valid():
    names = ("features", "labels", "logits", "centers", "reliable", "class_counts")
    return dict(zip(names, random_batch())) | {"progress": 0.5}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"features": torch.zeros(3)}, ValueError, r"features: expected shape \[R, D\], found \[3\]"),
        ({"features": [1.0]}, TypeError, "features: expected a tensor, found list"),
        ({"features": torch.zeros(21, 6, dtype=torch.long)}, TypeError, "features: expected dtype float"),
        ({"labels": torch.zeros(22, dtype=torch.long)}, ValueError, "labels: expected at most 21 entries"),
        ({"labels": torch.zeros(7)}, TypeError, "labels: expected dtype int64, found torch.float32"),
        ({"logits": torch.zeros(14, 4)}, ValueError, r"logits: expected shape \[14, 5\], found \[14, 4\]"),
        ({"logits": torch.zeros(13, 5)}, ValueError, r"logits: expected shape \[14, 5\], found \[13, 5\]"),
        ({"centers": torch.zeros(5, 7)}, ValueError, r"centers: expected shape \[K, 6\], found \[5, 7\]"),
        ({"centers": torch.zeros(0, 6)}, ValueError, "centers: expected at least one class"),
        ({"reliable": torch.ones(20, dtype=torch.bool)}, ValueError, r"reliable: expected shape \[21\], found \[20\]"),
        ({"reliable": torch.ones(21)}, TypeError, "reliable: expected dtype bool"),
        ({"class_counts": torch.ones(4)}, ValueError, r"class_counts: expected shape \[5\], found \[4\]"),
        ({"class_counts": torch.ones(5, dtype=torch.bool)}, TypeError, "class_counts: expected dtype number"),
        ({"has_center": torch.ones(5)}, TypeError, "has_center: expected dtype bool"),
        ({"has_center": torch.ones(4, dtype=torch.bool)}, ValueError, r"has_center: expected shape \[5\]"),
        ({"logits": torch.zeros(14, 5, device="meta")}, ValueError, "logits: expected device cpu, that of features"),
        ({"progress": -0.1}, ValueError, "progress: expected a number >= 0 and <= 1, found -0.1"),
        ({"progress": 7.0}, ValueError, "progress: expected a number >= 0 and <= 1, found 7.0"),
        ({"progress": torch.zeros((), dtype=torch.bool)}, TypeError, "progress: expected dtype number"),
        ({"progress": "half"}, TypeError, "progress: expected a number, found str"),
        ({"progress": torch.zeros(2)}, ValueError, r"progress: expected shape \[\], found \[2\]"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a number > 0"),
        ({"bta": float("nan")}, ValueError, "bta: expected a number >= 0, found nan"),
        ({"bta": 1.0}, ValueError, "bta: expected a number below 1 where min_temperature is 0, found 1.0"),
        ({"negative_weight": 0}, ValueError, "negative_weight: expected a number > 0"),
        ({"min_temperature": -1}, ValueError, "min_temperature: expected a number >= 0"),
        ({"top_k": 0}, ValueError, "top_k: expected a positive integer, found 0"),
        ({"top_k": True}, ValueError, "top_k: expected a positive integer, found True"),
        ({"top_k": 2.5}, ValueError, "top_k: expected a positive integer, found 2.5"),
        ({"neg_mode": "mean"}, ValueError, "neg_mode: expected one of authors, paper, found 'mean'"),
        (
            {"backend": "numpy"},
            ValueError,
            "backend: expected None or one of reference, cpp, triton, chunks, cuda, found 'numpy'",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        bacon_loss(**(valid() | change))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": torch.tensor([0] * 6 + [5])}, r"labels: expected classes in 0\.\.4, found 5"),
        ({"labels": torch.tensor([0] * 6 + [-1])}, r"labels: expected classes in 0\.\.4, found -1"),
        ({"class_counts": torch.tensor([3, 2, -1, 0, 0])}, "class_counts: expected finite numbers >= 0, found -1"),
        ({"class_counts": torch.tensor([1.0, 2, 3, 4, float("nan")])}, "class_counts: expected .*, found nan"),
        ({"class_counts": torch.tensor([1.0, 2, 3, 4, float("inf")])}, "class_counts: expected .*, found inf"),
        ({"progress": torch.tensor(1.5)}, r"progress: expected a number >= 0 and <= 1, found 1\.5"),
        ({"progress": torch.tensor(float("nan"))}, "progress: expected a number >= 0 and <= 1, found nan"),
    ],
    ids=["class-5", "class--1", "count--1", "count-nan", "count-inf", "progress-1.5", "progress-nan"],
)
def test_values_out_of_range_are_named_on_a_cpu(backend, change, message):
    with pytest.raises(ValueError, match=message):
        bacon_loss(**(valid() | change), backend=backend)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"class_counts": torch.zeros(0)}, ValueError, r"class_counts: expected at least one class, found shape \[0\]"),
        ({"class_counts": torch.tensor([-1.0])}, ValueError, "class_counts: expected finite numbers >= 0, found -1"),
        ({"progress": 2}, ValueError, "progress: expected a number >= 0 and <= 1, found 2"),
        ({"progress": "a"}, TypeError, "progress: expected a number, found str"),
        ({"temperature": -1}, ValueError, "temperature: expected a number > 0, found -1"),
        ({"bta": 1}, ValueError, "bta: expected a number below 1 where min_temperature is 0, found 1"),
        ({"min_temperature": -1}, ValueError, "min_temperature: expected a number >= 0, found -1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_arguments_of_the_temperatures_are_named(change, error, message):
    with pytest.raises(error, match=message):
        functional.balanced_temperatures(**({"class_counts": torch.ones(3), "progress": 0.0} | change))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_fake_tensors_have_no_values_to_check(backend):
    if backend not in BACKENDS:
        pytest.skip(str(backends.native_error))
    with FakeTensorMode() as fake:
        faked = {name: fake.from_tensor(v) if isinstance(v, torch.Tensor) else v for name, v in valid().items()}
        loss = bacon_loss(**(faked | {"progress": torch.tensor(0.5)}), backend=backend)
    assert loss.shape == () and loss.dtype == torch.float64


def test_the_strongest_adjustment_has_a_finite_loss():
    for options in ({"bta": 0.999}, {"bta": 50.0, "min_temperature": 0.01}):
        for backend in BACKENDS:
            assert bacon_loss(**(valid() | {"progress": 0.0}), **options, backend=backend).isfinite()


def test_an_interpreted_kernel_is_no_default(monkeypatch):
    def interpreted(*arguments, **options):
        raise AssertionError("ran")

    usable = backends.Backend(interpreted, lambda tensor: None)
    table = {"triton": usable, "reference": backends.BACKENDS["bacon_loss"]["reference"]}
    monkeypatch.setitem(backends.BACKENDS, "bacon_loss", table)
    assert bacon_loss(**valid()).isfinite()
    with pytest.raises(AssertionError, match="ran"):
        bacon_loss(**valid(), backend="triton")


def test_an_unusable_backend_says_why(monkeypatch):
    never = backends.Backend(backends.BACKENDS["bacon_loss"]["reference"].run, lambda tensor: "there is no compiler")
    table = {"triton": never, "reference": backends.BACKENDS["bacon_loss"]["reference"]}
    monkeypatch.setitem(backends.BACKENDS, "bacon_loss", table)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run bacon_loss here: there is no compiler"):
        bacon_loss(**valid(), backend="triton")
    with pytest.raises(RuntimeError, match="backend 'cpp' does not implement bacon_loss, which has triton, reference"):
        bacon_loss(**valid(), backend="cpp")
    assert torch.equal(bacon_loss(**valid()), bacon_loss(**valid(), backend="reference"))
