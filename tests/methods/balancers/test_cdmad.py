"""CDMAD against the numbers of newer_methods.md L, its network, and the authors' slip behind its flag."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from balancer_cases import batch
from torch import nn

from bacon_fast.methods.alignment import DistributionAlignment
from bacon_fast.methods.balancers.base import Rows
from bacon_fast.methods.balancers.cdmad import AUTHORS_PASSES, CDMAD
from bacon_fast.methods.fixmatch import FixMatch
from bacon_fast.methods.outputs import Batch, Outputs
from bacon_fast.models.batchnorm import BatchNorm2d
from bacon_fast.models.network import DebiasedNetwork

BETA = [[1.5, 0, -0.5]]
WEAK = [[2, 1, 0], [0.2, 0.1, 0.3]]
STRONG = [[1, 0, 0], [0, 1, 0], [0.5, 0.5, 0], [0, 0, 1]]  # view by view
LABELED, LABELS = [[1, 0, 0], [0, 0, 1]], torch.tensor([0, 2])
Q = [[0.27406862, 0.45186276, 0.27406862], [0.07563513, 0.30671557, 0.6176493]]
EARLY = [[0.66524096, 0.24472847, 0.09003057], [0.33222499, 0.30060961, 0.3671654]]
ONES = (1.0, 1.0, 1.0)
STEP = torch.tensor(0)


def tensor(rows, **options) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64, **options)


def rows(beta=BETA) -> Rows:
    own = None if beta is None else tensor(beta)
    return Rows(tensor(WEAK), torch.empty(0), torch.empty(0), None, batch(LABELS, torch.arange(2)), own)


def losses(threshold: float = 0.0):
    out = Outputs(torch.zeros(8, 1), tensor(LABELED + WEAK + STRONG, requires_grad=True), None, 2, 2)
    seen = rows()
    targets = CDMAD(ONES, start=0)(seen, STEP, True)
    base = FixMatch(threshold=threshold, lambda_u=1.0, strong_views=2)
    found, _, pseudo_labels = base(out, seen.batch, STEP, targets)
    return out, found, pseudo_labels


# --- the documented numbers ------------------------------------------------------------------------------------------


def test_the_documented_step():
    targets = CDMAD(ONES, start=0)(rows(), STEP, True)
    assert targets.soft and targets.probabilities.numpy() == pytest.approx(np.array(Q), abs=1e-8)
    terms = F.cross_entropy(tensor(STRONG), targets.probabilities.repeat(2, 1), reduction="none")
    assert terms.tolist() == pytest.approx([1.27737609, 1.24472915, 1.0950544, 0.93379541], abs=1e-8)
    out, found, pseudo_labels = losses()
    assert found["unsupervised"].item() == pytest.approx(1.13773876, abs=1e-8)
    assert found["supervised"].item() == pytest.approx(0.55144471, abs=1e-8)
    assert pseudo_labels.tolist() == [1, 2]
    (gradient,) = torch.autograd.grad(found["unsupervised"], out.logits)
    expected = [0.07551207, -0.0599803, -0.01553177, 0.03407661, 0.06735033, -0.10142694]
    assert gradient[4:6].flatten().tolist() == pytest.approx(expected, abs=1e-8)
    assert not gradient[:4].any()


def test_before_the_start_the_bias_stays():
    balancer = CDMAD(ONES, start=50_500)
    assert (balancer.phase(50_499), balancer.phase(50_500)) == (False, True)
    targets = balancer(rows(None), STEP, False)
    assert targets.probabilities.numpy() == pytest.approx(np.array(EARLY), abs=1e-8)


def test_the_documented_alignment():
    alignment = DistributionAlignment(tensor([0.6, 0.3, 0.1]), 0.999).double()
    aligned = alignment(CDMAD(ONES, start=0)(rows(), STEP, True).probabilities)
    expected = [0.6918532, 0.26292575, 0.04522105, 0.40510685, 0.37866379, 0.21622936]
    assert aligned.flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_gradients_against_autograd_of_the_formulas():
    out, found, _ = losses()
    (gradient,) = torch.autograd.grad(sum(found.values()), out.logits)
    logits = out.logits.detach().requires_grad_()
    q = (logits[2:4].detach() - tensor(BETA)).softmax(1)
    terms = [-logits[i].log_softmax(0)[y] / 2 for i, y in enumerate([0, 2])]
    terms += [-(q[j] * logits[4 + 2 * v + j].log_softmax(0)).sum() / 4 for v in range(2) for j in range(2)]
    (expected,) = torch.autograd.grad(sum(terms), logits)
    torch.testing.assert_close(gradient, expected)


def test_without_a_row_above_the_threshold_the_unlabeled_loss_is_0():
    _, found, pseudo_labels = losses(threshold=0.99)
    assert found["unsupervised"].item() == 0 and pseudo_labels.tolist() == [-1, -1]


def test_a_constant_in_the_bias_changes_nothing():
    shifted = rows([[b + 7 for b in BETA[0]]])
    one, two = (CDMAD(ONES, start=0)(seen, STEP, True).probabilities for seen in (rows(), shifted))
    torch.testing.assert_close(one, two)


# --- the pass of the empty image -------------------------------------------------------------------------------------


class Plain(nn.Module):
    """A sum filter of 3x3 pixels with BatchNorm, whose pixels are the classes: what the documented numbers are of."""

    num_features = 9

    def __init__(self, momentum: float = 0.1) -> None:
        super().__init__()
        self.bn = BatchNorm2d(1, eps=1e-12, momentum=momentum)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.bn(F.conv2d(images, images.new_ones(1, 3, 3, 3) / 3, padding=1)).flatten(1)


def network(momentum: float = 0.1) -> DebiasedNetwork:
    made = DebiasedNetwork("wrn-10-1", 9, bn_momentum=momentum)
    made.backbone, made.head = Plain(momentum), nn.Identity()
    return made.double()


def images(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(8, 3, 3, 3, generator=generator, dtype=torch.float64)
    return replace(batch(LABELS, torch.arange(2)), images=pixels)


@pytest.mark.parametrize("brightness", [1.0, 2.0, 17.0])
def test_the_documented_answer_to_an_image_of_one_color(brightness):
    balancer, online = CDMAD((brightness,) * 3, start=0), network()
    balancer.bind(online, network())
    corner, edge, center = -0.91923882, 0.35355339, 2.2627417
    expected = [corner, edge, corner, edge, center, edge, corner, edge, corner]
    beta = balancer.own_pass(images(), True)
    assert beta.flatten().tolist() == pytest.approx(expected, abs=1e-7) and not beta.requires_grad
    assert online.training


def test_the_pass_leaves_the_running_statistics_as_they_are_and_is_left_out_before_the_start():
    balancer, online = CDMAD(ONES, start=5), network()
    balancer.bind(online, network())
    before = {name: value.clone() for name, value in online.named_buffers()}
    assert balancer.own_pass(images(), False) is None
    assert balancer.own_pass(images(), True) is not None
    assert all(torch.equal(value, before[name]) for name, value in online.named_buffers())


@pytest.mark.parametrize(("base", "share"), [("fixmatch", 0.1602), ("remixmatch", 0.0437)])
@pytest.mark.parametrize("phase", [False, True])
def test_the_authors_slip_gives_the_image_their_share_of_the_running_statistics(base, share, phase):
    """newer_methods.md L: their momentum is 0.1, and I comes first in a step. Ours moves the statistics once with the
    weight of their other passes; on images of mean 0 the share is what is left of the mean of I."""
    passes = AUTHORS_PASSES[base]
    online = network(1 - 0.9**passes)
    balancer = CDMAD(ONES, start=5, authors_passes=passes)
    balancer.bind(online, network())
    mean = F.conv2d(torch.ones(1, 3, 3, 3), torch.ones(1, 3, 3, 3) / 3, padding=1).mean().item()
    for _ in range(200):
        balancer.own_pass(images(), phase)
        online.backbone(torch.zeros(2, 3, 3, 3, dtype=torch.float64))
    assert online.backbone.bn.running_mean.item() / mean == pytest.approx(share, abs=5e-5)
    assert online.backbone.bn.momentum == 1 - 0.9**passes


# --- prediction ------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    num_features = 3

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


def test_the_documented_prediction():
    """Logits (3, 2.5, 0) and beta = (1.5, 0, -.5): class 1, not 0."""
    made = DebiasedNetwork("wrn-10-1", 3, bn_momentum=0.1)
    made.backbone, made.head = Linear(), nn.Linear(3, 3)
    with torch.no_grad():
        made.head.weight.copy_(torch.tensor([[1.5, 0, 0], [2.5, 0, 0], [0.5, 0, 0]]))
        made.head.bias.copy_(torch.tensor([1.5, 0, -0.5]))
    made.empty_image.zero_()
    image = torch.ones(1, 3, 4, 4)
    assert made.eval()(image)[1].tolist() == [[3, 2.5, 0]]
    features, logits = made.predict(image)
    assert logits.tolist() == [[1.5, 2.5, 0.5]] and features.tolist() == [[1, 1, 1]]


def test_zeros_as_the_empty_image_take_the_constant_of_a_linear_classifier_out():
    """g = Wx + c: g(x) - g(0) = Wx, whatever the chunk."""
    torch.manual_seed(0)
    made = DebiasedNetwork("wrn-10-1", 3, bn_momentum=0.1)
    made.backbone, made.head = Linear(), nn.Linear(3, 5)
    made = made.double().eval()
    made.empty_image.zero_()
    seen = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    expected = seen.mean((2, 3)) @ made.head.weight.T
    torch.testing.assert_close(made.predict(seen)[1], expected.detach())
    torch.testing.assert_close(made.predict(seen[:1])[1], expected[:1].detach())


def test_a_prediction_does_not_depend_on_the_images_beside_it():
    torch.manual_seed(0)
    made = DebiasedNetwork("wrn-10-1", 4, bn_momentum=0.1).eval()
    seen = torch.randn(5, 3, 16, 16)
    features, logits = made.predict(seen)
    beta = made(torch.ones(1, 3, 16, 16))[1]
    torch.testing.assert_close(logits, made(seen)[1].detach() - beta.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.predict(seen[2:3])[1], logits[2:3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features, made(seen)[0].detach(), rtol=1e-4, atol=1e-5)
