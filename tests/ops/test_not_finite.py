"""What is not finite shows in what comes out, and what is finite comes out right however large it is."""

import math

import pytest
import torch
import torch.nn.functional as F

from bacon_fast.functional import bacon_loss, class_centers, info_nce, sscl_loss, sup_con_loss
from bacon_fast.ops import backends

NAMES = ("reference", "cpp", "triton")
BACKENDS = [name for name in NAMES if backends.BACKENDS["contrastive"][name].why_not(torch.empty(1, 1)) is None]
EVERY = pytest.mark.parametrize("backend", BACKENDS)
NOT_FINITE = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
# numpy, in Triton's interpreter
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|All-NaN):RuntimeWarning")

PAIRS, ALONE = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3]), torch.arange(8)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def bacon(features, centers, **options):
    """BaCon's loss of 8 rows, 3 of them labeled, of 4 classes."""
    logits, everyone = 3 * normal(5, 4, seed=7).double(), torch.ones(8, dtype=torch.bool)
    counts = torch.tensor([3, 2, 1, 1])
    return bacon_loss(features, torch.tensor([0, 0, 1]), logits, centers, everyone, counts, progress=0.5, **options)


LOSSES = {
    "sup_con": lambda x, y, **o: sup_con_loss(x, PAIRS, **o),
    "sup_con_pml": lambda x, y, **o: sup_con_loss(x, PAIRS, reduction="pml", **o),
    "info_nce": lambda x, y, **o: info_nce(x, y, **o),
    "info_nce_queue": lambda x, y, **o: info_nce(x, y, y.flip(0), **o),
    "sscl": lambda x, y, **o: sscl_loss(x, y[:, None], y.flip(0), **o),
    "bacon": lambda x, y, **o: bacon(x, y[:4], **o),
    "bacon_paper": lambda x, y, **o: bacon(x, y[:4], neg_mode="paper", **o),
}


@EVERY
@NOT_FINITE
@pytest.mark.parametrize("name", LOSSES)
def test_a_feature_that_is_not_finite_shows_in_the_loss_and_in_its_gradient(name, value, backend):
    x, y = normal(8, 6), normal(8, 6, seed=1)
    for broken, other in ((x, y), (y, x)):
        if name.startswith("sup_con") and broken is y:
            continue
        broken = broken.clone()
        broken[2, 3] = value
        first = (broken if other is y else x).requires_grad_()
        loss = LOSSES[name](first, y if other is y else broken, backend=backend)
        assert not loss.isfinite()
        (gradient,) = torch.autograd.grad(loss, first)
        assert not gradient.isfinite().all()


@EVERY
@NOT_FINITE
@pytest.mark.parametrize("reduction", ["wmean", "pml", "none"])
def test_sup_con_without_positives_is_zero_for_finite_features_alone(reduction, value, backend):
    x = normal(8, 6).requires_grad_()
    loss = sup_con_loss(x, ALONE, reduction=reduction, backend=backend)
    assert not loss.any()
    assert not torch.autograd.grad(loss.sum(), x)[0].any()
    broken = x.detach().clone()
    broken[5, 0] = value
    assert not sup_con_loss(broken, ALONE, reduction=reduction, backend=backend).isfinite().all()


@EVERY
@NOT_FINITE
@pytest.mark.parametrize("reduction", ["wmean", "pml", "none"])
def test_a_weight_that_is_not_finite_shows(reduction, value, backend):
    weights = torch.ones(8)
    weights[1] = value if value > 0 or math.isnan(value) else math.inf
    assert not sup_con_loss(normal(8, 6), PAIRS, weights=weights, reduction=reduction, backend=backend).isfinite().all()


@EVERY
@pytest.mark.parametrize("reduction", ["wmean", "pml", "none"])
def test_weights_that_are_all_zero_give_zero(reduction, backend):
    x = normal(8, 6).requires_grad_()
    loss = sup_con_loss(x, PAIRS, weights=torch.zeros(8), reduction=reduction, backend=backend)
    assert not loss.any() and not torch.autograd.grad(loss.sum(), x)[0].any()


@EVERY
@NOT_FINITE
def test_a_trust_that_is_not_finite_shows_unless_its_key_is_masked(value, backend):
    x, alpha = normal(8, 6), torch.ones(8, 2)
    alpha[3, 1] = value
    keys, mask = normal(8, 2, 6, seed=1), torch.ones(8, 2, dtype=torch.bool)
    loss = sscl_loss(x, keys, x, alpha=alpha, key_mask=mask, reduction="none", backend=backend)
    assert loss.isnan().tolist() == [row == 3 for row in range(8)]
    mask[3, 1] = False
    assert sscl_loss(x, keys, x, alpha=alpha, key_mask=mask, backend=backend).isfinite()


@EVERY
def test_a_positive_that_is_not_finite_shows_where_there_are_no_negatives(backend):
    x = normal(1, 6)
    assert info_nce(x, x * math.nan, backend=backend).isnan()


# 2^65 has a square beyond float32, 1e37 leaves hardly room for a norm.
@EVERY
@pytest.mark.parametrize("scale", [2.0**65, 1e30, 1e37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", LOSSES)
def test_large_features_keep_their_norm(name, dtype, scale, backend):
    """No loss looks at lengths: the value is that of float64, and the gradient too, divided by the scale."""
    x, y = ((normal(8, 32, seed=seed) * scale).to(dtype) for seed in (0, 1))
    exact = x.double().requires_grad_()
    expected = LOSSES[name](exact, y.double(), backend="reference")
    (slope,) = torch.autograd.grad(expected, exact)
    x.requires_grad_()
    loss = LOSSES[name](x, y, backend=backend)
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(loss.double(), expected, rtol=3e-6, atol=1e-8)
    rounding = 2**-8 if dtype == torch.bfloat16 else 2e-5
    smallest = 1e-40 if dtype == torch.bfloat16 else 1e-44  # of the gradient near the end of the range, a few steps
    allowed = rounding * slope.abs().max().item() + smallest
    torch.testing.assert_close(gradient.double(), slope, rtol=rounding, atol=allowed)


@EVERY
@pytest.mark.parametrize("name", LOSSES)
def test_the_largest_float_of_all_is_a_feature_like_others(name, backend):
    signs = normal(8, 32).sign(), normal(8, 32, seed=1).sign()
    expected = LOSSES[name](*(sign.double() for sign in signs), backend="reference")
    largest = torch.finfo(torch.float32).max
    loss = LOSSES[name](*(sign * largest for sign in signs), backend=backend)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_has_norms_beyond_its_squares_too(backend):
    x, y = normal(8, 32).double(), normal(8, 32, seed=1).double()
    for name, loss in LOSSES.items():
        found = loss(x * 1e200, y * 1e250, backend=backend)
        torch.testing.assert_close(found, loss(x, y, backend="reference"), msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.skipif("cpp" not in BACKENDS, reason="no native extension")
@pytest.mark.parametrize("scale", [1e20, 1e30, 3e38])
def test_a_large_queue_is_read_where_it_lies_only_if_its_norms_are_ordinary(scale):
    x, queue = normal(8, 128), normal(8192, 128, seed=1).sign()
    expected = info_nce(x, x.roll(1, 0), queue, backend="cpp")
    torch.testing.assert_close(info_nce(x, x.roll(1, 0), queue * scale, backend="cpp"), expected)
    queue[0, 0] = math.nan
    assert info_nce(x, x.roll(1, 0), queue * scale, backend="cpp").isnan()


@EVERY
@pytest.mark.parametrize("scale", [1e-25, 1e-13, 1e-42, 0.0])
def test_small_features_are_divided_by_epsilon(scale, backend):
    """As torch.nn.functional.normalize does: similarities of vectors shorter than 1e-12 shrink with them."""
    x, y = normal(8, 6) * scale, normal(8, 6, seed=1)
    unit = F.normalize(x.double(), dim=1), F.normalize(y.double(), dim=1)
    expected = F.cross_entropy(unit[0] @ unit[1].T / 0.1, torch.arange(8))
    torch.testing.assert_close(info_nce(x, y, backend=backend).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("value", "expected"), [(1e4, 4096), (-1e10, -4096), (3e38, 4096), (math.nan, math.nan), (math.inf, math.nan)]
)
def test_class_centers_clamp_what_is_large_and_show_what_is_not_finite(value, expected):
    bank, labels = torch.tensor([[value, 2.0], [0.0, 4.0], [1.0, 1.0], [5.0, 5.0]]), torch.tensor([0, 0, 1, -1])
    centers, has_center = class_centers(bank, labels, 3)
    first = [expected / 2, 3.0] if math.isfinite(expected) else [math.nan, math.nan]
    torch.testing.assert_close(centers, torch.tensor([first, [1.0, 1.0], [0.0, 0.0]]), equal_nan=True, rtol=0, atol=0)
    assert has_center.tolist() == [True, True, False]
    bank[3] = value  # of no class
    assert class_centers(bank[1:], labels[1:], 3)[0].isfinite().all()
