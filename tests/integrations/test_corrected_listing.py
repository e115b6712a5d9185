"""The corrected listing against a loop over rows, written from its formula."""

import math

import pytest
import torch

from bacon_fast.integrations.listing import BaConLoss


def loop_loss(features, labels, confidences, class_counts, t, T, centers, *, tau=0.5, tau_min=0.1):
    """One row after the other. `centers` maps a class to a vector."""
    num_classes = confidences.shape[1]
    unit = [row / row.norm() for row in features]
    classes = [int(y) if y >= 0 else int(c.argmax()) for y, c in zip(labels, confidences)]
    k = max(1, min(3, num_classes - 1))
    excluded = [
        {int(y)} if y >= 0 else set(c.argsort(descending=True, stable=True)[:k].tolist())
        for y, c in zip(labels, confidences)
    ]
    total, weight = torch.zeros((), dtype=features.dtype), 1e-8
    for r, row in enumerate(unit):
        if confidences[r].max() < 0.98:
            continue
        weight += 1
        y = classes[r]
        negatives = [j for j in range(len(unit)) if y not in excluded[j]]
        if y not in centers or not negatives:
            continue
        ratio = float(class_counts[y]) / max(float(max(class_counts)), 1)
        tau_y = max(tau * (1 - (1 - t / T) ** 2 * math.sqrt(ratio)), tau_min)
        positive = torch.dot(row, centers[y]) / centers[y].norm() / tau_y
        terms = [torch.dot(row, unit[j]) / tau for j in negatives]
        epsilon = torch.tensor(math.log(1e-8), dtype=features.dtype)
        total = total + torch.logsumexp(torch.stack([positive, *terms, epsilon]), 0) - positive
    return total / weight


def make_batch(seed, num_classes=6, rows=60, dim=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, dim, generator=generator, dtype=dtype)
    labels = torch.randint(-1, num_classes, (rows,), generator=generator)
    sharpness = torch.rand(rows, 1, generator=generator, dtype=dtype) * 20
    confidences = (torch.randn(rows, num_classes, generator=generator, dtype=dtype) * sharpness).softmax(1)
    counts = torch.randint(1, 500, (num_classes,), generator=generator)
    return features, labels, confidences, counts


def centers_by_loop(batches):
    """Mean of the unit-length reliable features of each class."""
    rows = {}
    for features, labels, confidences, _ in batches:
        for z, y, c in zip(features, labels, confidences):
            if c.max() >= 0.98:
                rows.setdefault(int(y) if y >= 0 else int(c.argmax()), []).append(z / z.norm())
    return {y: torch.stack(vectors).mean(0) for y, vectors in rows.items()}


@pytest.mark.parametrize("num_classes", [2, 3, 4, 6, 40])
def test_equals_the_loop_in_value_gradient_and_centers(num_classes):
    loss = BaConLoss(num_classes, T=1000)
    past = [make_batch(seed, num_classes) for seed in (1, 2)]
    for batch in past:
        loss(*batch, 0)
    centers = centers_by_loop(past)
    assert len(centers) > 0 and (num_classes < 40 or len(centers) < 40)  # some classes have none
    for c in range(num_classes):
        torch.testing.assert_close(loss.centers[c], centers.get(c, torch.zeros(5, dtype=torch.float64)))
    features, labels, confidences, counts = make_batch(3, num_classes)
    for t in (0, 400, 1000):
        loss.eval()
        one, two = features.clone().requires_grad_(), features.clone().requires_grad_()
        found = loss(one, labels, confidences, counts, t, 1000)
        expected = loop_loss(two, labels, confidences, counts, t, 1000, centers)
        assert expected > 0
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)
        torch.testing.assert_close(
            *torch.autograd.grad(found, one), *torch.autograd.grad(expected, two), rtol=1e-8, atol=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_near_the_loop(dtype):
    loss, past, batch = BaConLoss(6), make_batch(1), make_batch(2)
    loss(*past, 0)
    features = batch[0].to(dtype)
    expected = loop_loss(features.double(), *batch[1:], 10, 300_000, centers_by_loop([past]))
    found = loss(features, batch[1], batch[2].float(), batch[3], 10)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_first_call_has_no_center_and_no_gradient():
    features, *rest = make_batch(0)
    features.requires_grad_()
    value = BaConLoss(6)(features, *rest, 0, 10)
    assert value == 0
    (gradient,) = torch.autograd.grad(value, features)
    assert not gradient.any()


def test_nothing_reliable_leaves_centers_and_loss_at_zero():
    loss = BaConLoss(4)
    features, labels, _, counts = make_batch(0, 4)
    value = loss(features, labels, torch.full((60, 4), 0.25), counts, 5)
    assert value == 0 and not loss.center_counts.any() and not loss.center_sums.any()


def test_the_threshold_itself_is_reliable_and_eval_mode_keeps_the_centers():
    loss = BaConLoss(2, feature_dim=3)
    confidences = torch.tensor([[0.98, 0.02], [0.9799, 0.0201]], dtype=torch.float64)
    labels = torch.tensor([-1, -1])
    loss(torch.eye(2, 3), labels, confidences, torch.ones(2), 0)
    assert loss.center_counts.tolist() == [1, 0]
    loss.eval()(torch.eye(2, 3), labels, confidences, torch.ones(2), 1)
    assert loss.center_counts.tolist() == [1, 0]


def test_temperature_follows_steps_and_counts():
    """The same batch pulls a frequent class harder early in training and equally at its end."""
    loss = BaConLoss(2, feature_dim=2)
    labels, confidences = torch.tensor([0, 1]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss(torch.eye(2), labels, confidences, torch.ones(2), 0)
    loss.eval()

    def value(counts, t):
        return float(loss(torch.eye(2), labels, confidences, torch.tensor(counts), t, 100))

    assert value([100, 1], 0) < value([1, 1], 100)
    assert value([100, 1], 100) == value([1, 1], 100)
    # Past the end the schedule stands still, and a step may be a tensor.
    assert value([100, 1], 150) == value([100, 1], 100) == value([100, 1], torch.tensor(100))


def test_centers_are_in_the_checkpoint_also_of_a_fresh_module(tmp_path):
    loss = BaConLoss(6)
    past, batch = make_batch(1), make_batch(2)
    loss(*past, 0)
    torch.save(loss.state_dict(), tmp_path / "loss.pt")
    fresh = BaConLoss(6)
    fresh.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))
    assert set(fresh.state_dict()) == {"center_sums", "center_counts"}
    assert torch.equal(fresh(*batch, 7), loss(*batch, 7)) and torch.equal(fresh.centers, loss.centers)
    with pytest.raises(RuntimeError, match="size mismatch"):
        BaConLoss(6, feature_dim=9).load_state_dict(loss.state_dict())


def test_a_row_that_is_not_finite_does_not_enter_the_centers():
    loss = BaConLoss(3)
    features = torch.tensor([[1.0, 0.0], [float("nan"), 1.0], [float("inf"), 0.0]])
    loss(features, torch.tensor([0, 1, 2]), torch.eye(3), torch.ones(3), 0)
    assert loss.center_counts.tolist() == [1, 0, 0] and loss.centers.tolist() == [[1, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(60, 4)}, r"features: expected \[B, 5\]"),
        ({"features": torch.zeros(60, 5, dtype=torch.int64)}, "features: expected float"),
        ({"labels": torch.zeros(59, dtype=torch.int64)}, r"labels: expected int64 \[60\]"),
        ({"labels": torch.zeros(60)}, "labels: expected int64"),
        ({"confidences": torch.zeros(60, 5)}, r"confidences: expected shape \[60, 6\]"),
        ({"class_counts": torch.ones(5)}, "class_counts"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    loss = BaConLoss(6, feature_dim=5)
    arguments = dict(zip(("features", "labels", "confidences", "class_counts"), make_batch(0)))
    with pytest.raises(ValueError, match=message):
        loss(**{**arguments, **change}, t=0)


@pytest.mark.parametrize("name", ["num_classes", "tau", "tau_min", "T"])
def test_wrong_parameters_are_named(name):
    with pytest.raises(ValueError, match=f"{name}: expected a positive number, found 0"):
        BaConLoss(**{"num_classes": 3, name: 0})


@pytest.mark.parametrize("label", [-2, -100, 6, 2**40])
def test_labels_out_of_range_are_named_and_on_a_gpu_give_nan(label, monkeypatch):
    loss = BaConLoss(6, T=1000)
    loss(*make_batch(1), 0)
    features, labels, confidences, counts = make_batch(2)
    features.requires_grad_()
    labels[3], confidences[3, 0] = label, 1.0  # a reliable row
    before = loss.center_counts.clone()
    with pytest.raises(ValueError, match=rf"labels: expected classes in 0\.\.5, or -1 for none, found {label}"):
        loss(features, labels, confidences, counts, 5)
    assert torch.equal(loss.center_counts, before)
    monkeypatch.setattr("bacon_fast.integrations.listing.check_values", lambda *_: None)  # a GPU's are not looked at
    value = loss(features, labels, confidences, counts, 5)
    assert value.isnan() and torch.autograd.grad(value, features)[0].isnan().any()
    without = torch.arange(60) != 3
    expected = before + torch.bincount(
        torch.where(labels >= 0, labels, confidences.argmax(1))[without & (confidences.amax(1) >= 0.98)], minlength=6
    )
    assert torch.equal(loss.center_counts, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["features", "confidences"])
def test_what_is_not_finite_gives_nan_and_leaves_the_centers_finite(which, value):
    loss = BaConLoss(6, T=1000)
    loss(*make_batch(1), 0)
    batch = dict(zip(("features", "labels", "confidences", "counts"), make_batch(2)))
    batch[which][3, 2] = value
    assert loss(*batch.values(), 5).isnan()
    assert loss.centers.isfinite().all()
