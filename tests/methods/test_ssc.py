"""SSC's step against float64 loops written from methods.md G, and against pytorch-metric-learning."""

import math

import pytest
import torch
import torch.nn.functional as F
from no_synchronization import NoSynchronization
from pytorch_metric_learning.losses import SupConLoss
from pytorch_metric_learning.reducers import DoNothingReducer
from torch import nn

from bacon_fast.functional import sup_con_loss
from bacon_fast.methods.outputs import Batch
from bacon_fast.methods.ssc import SSC
from bacon_fast.models.heads import projection_head
from bacon_fast.models.ssc import PrototypeNetwork

B, U, K, WIDTH, SIDE = 4, 6, 3, 5, 4
T, T_PL = 0.1, 0.08


def build(dtype: torch.dtype = torch.float64, **changes) -> SSC:
    torch.manual_seed(3)
    network = PrototypeNetwork("wrn-10-1", K, bn_momentum=0.1, temperature=T_PL)
    # Without BatchNorm, so that a row's gradient is its own.
    network.backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, WIDTH), nn.Tanh())
    network.projector = projection_head(WIDTH, WIDTH, 2)
    network.prototypes = nn.Parameter(3 * torch.randn(K, WIDTH))
    options = {"lambda_proto": 1.0, "lambda_up": 1.0, "lambda_down": 0.2, "reduction": "wmean"}
    return SSC(network, **({"threshold": 0.95, "temperature": T} | options | changes)).to(dtype)


def make_batch(labels=(0, 0, 1, 0), dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(len(labels) + 3 * U, 3, SIDE, SIDE, generator=generator, dtype=torch.float64).to(dtype)
    slots = torch.arange(len(labels)), torch.arange(U)
    return Batch(images, torch.tensor(labels, dtype=torch.int64), *slots, torch.tensor([-1, 0, 1, 2, 0, 1]))


def unit(row: torch.Tensor) -> torch.Tensor:
    return row / (row * row).sum().sqrt()


def oracle(method: SSC, batch: Batch) -> tuple[torch.Tensor, list[int]]:
    """The loss row by row, and the pseudo-labels, -1 for none."""
    network, count = method.network, len(batch.labels)
    z = [unit(row) for row in network.projector(network.backbone(batch.images))]
    prototypes = [unit(row) for row in network.prototypes]
    pseudo = []
    for row in z[count : count + U]:
        powers = [math.exp(float((row @ c).detach()) / T_PL) for c in prototypes]
        best = max(range(K), key=powers.__getitem__)
        pseudo.append(best if powers[best] / sum(powers) >= method.threshold else -1)

    rows = prototypes + z[:count] + z[count + U :]
    strong_labels = [c if c >= 0 else K + j for j, c in enumerate(pseudo)]
    labels = [*range(K), *batch.labels.tolist(), *strong_labels, *strong_labels]
    strong_weights = [method.lambda_up if c >= 0 else method.lambda_down for c in pseudo]
    weights = [method.lambda_proto] * K + [1.0] * count + strong_weights + strong_weights
    losses, has_positive = [], []
    for r, row in enumerate(rows):
        others = [j for j in range(len(rows)) if j != r]
        positives = [j for j in others if labels[j] == labels[r]]
        has_positive.append(bool(positives))
        if positives:
            everything = sum(((row @ rows[j]) / T).exp() for j in others).log()
            losses.append(everything - sum(row @ rows[j] for j in positives) / T / len(positives))
        else:
            losses.append(0 * row.sum())
    total = sum(w * loss for w, loss in zip(weights, losses))
    if method.reduction == "wmean":
        return total / sum(w for w, valid in zip(weights, has_positive) if valid), pseudo
    number = sum(w * loss.item() > 0 for w, loss in zip(weights, losses))
    return len(rows) * total / (sum(weights) * number), pseudo


CASES = {
    "some confident": {"threshold": 0.7},
    "none confident": {"threshold": 1.1},
    "all confident": {"threshold": 0.0},
    "weights": {"threshold": 0.7, "lambda_proto": 0.5, "lambda_up": 1.2, "lambda_down": 0.3},
    "weights of 0": {"threshold": 0.7, "lambda_proto": 0.0, "lambda_up": 0.0, "lambda_down": 0.0},
}


@pytest.mark.parametrize("reduction", ["wmean", "pml"])
@pytest.mark.parametrize("case", CASES)
def test_the_step_against_loops(case, reduction):
    method, batch = build(**CASES[case], reduction=reduction), make_batch()  # class 2 has no labeled row
    expected, pseudo = oracle(method, batch)
    output = method(batch, torch.tensor(0), None)
    assert output.pseudo_labels.tolist() == pseudo
    confident = [c for c in pseudo if c >= 0]
    assert (0 < len(confident) < U) if method.threshold == 0.7 else len(confident) in (0, U)
    assert output.losses.keys() == {"total", "contrastive"}
    torch.testing.assert_close(output.total, expected, rtol=1e-9, atol=1e-12)
    parameters = dict(method.named_parameters())
    gradients = [torch.autograd.grad(loss, list(parameters.values())) for loss in (output.total, expected)]
    for name, found, wanted in zip(parameters, *gradients):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-10, msg=lambda m, at=name: f"{at}: {m}")
    known = [(c, t) for c, t in zip(pseudo, batch.true_labels.tolist()) if c >= 0 and t >= 0]
    assert output.stats["pseudo_known"] == len(known)
    assert output.stats["pseudo_correct"] == sum(c == t for c, t in known)
    assert output.stats["pseudo_rate"].item() == pytest.approx(len(confident) / U)


@pytest.mark.parametrize("lambda_down, lambda_proto", [(1.0, 1.0), (0.2, 0.5)])
def test_pml_reduction_is_the_weighted_mean_over_pytorch_metric_learning_s_losses(lambda_down, lambda_proto):
    """As the authors have it: losses times w over mean w, averaged over the positive ones."""
    method = build(threshold=0.7, reduction="pml", lambda_down=lambda_down, lambda_proto=lambda_proto)
    batch = make_batch()
    output = method(batch, torch.tensor(0), None)
    with torch.no_grad():
        projections = method.network(batch.images)
    labeled, _, strong = projections.split([B, U, 2 * U])
    own = torch.where(output.pseudo_labels < 0, K + torch.arange(U), output.pseudo_labels)
    labels = torch.cat([torch.arange(K), batch.labels, own, own])
    rows = torch.cat([method.network.prototypes.detach(), labeled, strong])
    strong_weights = torch.where(output.pseudo_labels < 0, lambda_down, 1.0)
    weights = torch.cat([torch.full((K,), lambda_proto), torch.ones(B), strong_weights, strong_weights])
    if lambda_down == lambda_proto == 1:
        expected = SupConLoss(temperature=T)(rows, labels)
    else:
        losses = SupConLoss(temperature=T, reducer=DoNothingReducer())(rows, labels)["loss"]["losses"]
        losses = losses * weights / weights.mean()
        expected = losses[losses > 0].mean()
    torch.testing.assert_close(output.total, expected.double(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_with_prototypes_as_columns_it_is_the_cross_entropy_of_a_cosine_classifier(temperature):
    """methods.md G.4: one labeled row at a time has the prototypes, and nothing else, to be compared with."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(B, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    prototypes = torch.randn(K, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([2, 0, 1, 2])
    options = {"prototypes": prototypes, "prototype_weight": 0.0, "temperature": temperature}
    unified = sum(sup_con_loss(z[b : b + 1], y[b : b + 1], **options) for b in range(B)) / B
    logits = F.normalize(z, dim=1) @ F.normalize(prototypes, dim=1).T / temperature
    expected = F.cross_entropy(logits, y)
    torch.testing.assert_close(unified, expected, rtol=1e-12, atol=0)
    for found, wanted in zip(*(torch.autograd.grad(loss, (z, prototypes)) for loss in (unified, expected))):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)


def test_weak_views_only_name_the_classes():
    method, batch = build(threshold=0.7), make_batch()
    images = batch.images.requires_grad_()
    (gradient,) = torch.autograd.grad(method(batch, torch.tensor(0), None).total, images)
    moved = gradient.flatten(1).any(1)
    assert not moved[B : B + U].any() and moved[:B].all() and moved[B + U :].all()


def test_prediction_is_the_nearest_prototype_of_any_length():
    network = build().network
    images = make_batch().images
    features, logits = network.predict(images)
    for row, feature, predicted in zip(network.projector(network.backbone(images)), features, logits):
        similarities = [(unit(row) @ unit(c)).item() for c in network.prototypes]
        torch.testing.assert_close(predicted, torch.tensor(similarities, dtype=torch.float64) / T_PL)
        torch.testing.assert_close(feature.double(), unit(row), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        network.prototypes.mul_(torch.tensor([[0.1], [1.0], [50.0]]))
    torch.testing.assert_close(network.predict(images)[1], logits)


def test_prototypes_are_standard_normal_and_as_wide_as_the_backbone():
    torch.manual_seed(0)
    network = PrototypeNetwork("wrn-10-2", 100, bn_momentum=0.1, temperature=T_PL)
    assert network.prototypes.shape == (100, 128)
    assert network.prototypes.std().item() == pytest.approx(1, abs=0.03)
    assert [tuple(p.shape) for p in network.projector.parameters()] == [(128, 128), (128,), (128, 128), (128,)]


def test_the_step_is_static():
    method, batch = build(dtype=torch.float32, threshold=0.7), make_batch(dtype=torch.float32)
    with NoSynchronization():
        method(batch, torch.tensor(0), None).total.backward()
    assert all(p.grad is not None for p in method.parameters())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_networks_have_a_float32_loss(half):
    method, batch = build(dtype=torch.float32, threshold=0.7), make_batch(dtype=torch.float32)
    expected = method(batch, torch.tensor(0), None)
    with torch.autocast("cpu", dtype=half):
        found = method(batch, torch.tensor(0), None)
    assert found.total.dtype == torch.float32
    assert found.pseudo_labels.tolist() == expected.pseudo_labels.tolist()
    torch.testing.assert_close(found.total, expected.total, rtol=0.02, atol=0)
