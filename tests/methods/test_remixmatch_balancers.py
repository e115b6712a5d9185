"""Where a class balancer acts in ReMixMatch: before the alignment, in its place, or on the targets."""

import math

import pytest
import torch
import torch.nn.functional as F
from refresh_cases import context_of
from test_remixmatch import COUNTS, FEATURES, N_ULB, STEPS, B, K, Network, build, make_batch

from bacon_fast.methods.balancers.base import Balancer, Targets
from bacon_fast.methods.balancers.crest import CReST
from bacon_fast.methods.balancers.darp import DARP
from bacon_fast.methods.balancers.daso import DASO
from bacon_fast.methods.extended import Phase

GIVEN = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.4, 0.3], [0.2, 0.5, 0.3], [0.6, 0.3, 0.1]]).double()


class Recorder(Balancer):
    """Answers with fixed probabilities and a loss, and keeps what it was shown."""

    def __init__(self, *, on_targets: bool = False, aligns: bool = False) -> None:
        super().__init__()
        self.on_targets, self.aligns = on_targets, aligns

    def averaged_images(self, batch, weak, strong, phase):
        self.images = torch.cat([batch.labeled_images, weak, strong])
        return self.images

    def phase(self, step: int) -> str:
        return "late" if step > 3 else "early"

    def forward(self, rows, step, phase) -> Targets:
        self.rows, self.seen_phase = rows, phase
        return Targets(GIVEN, losses={"extra": rows.strong_features.sum()})


def run(balancer: Balancer, t: int = 400):
    method = build(balancer=balancer)
    torch.manual_seed(1)
    averaged = Network(balanced_head=False).double().eval()
    method.bind(averaged)
    batch = make_batch()
    return method, averaged, batch, method(batch, torch.tensor(t), method.phase(t))


def sharpened(probabilities: torch.Tensor) -> torch.Tensor:
    powers = probabilities**2
    return powers / powers.sum(1, keepdim=True)


def aligned(method, probabilities: torch.Tensor) -> torch.Tensor:
    """By the first batch's average."""
    ratio = (method.alignment.target + 1e-6) / (probabilities.mean(0) + 1e-6)
    return probabilities * ratio / (probabilities * ratio).sum(1, keepdim=True)


def unmixed(method, batch, targets: torch.Tensor) -> float:
    """The loss of the first strong view against the targets, which are seen nowhere else without MixUp."""
    copy = build()
    logits = copy.network(batch.view(0))[1]
    return method.lambda_kl * F.cross_entropy(logits, targets).item()


def test_predictions_are_replaced_before_the_alignment():
    method, _, batch, output = run(Recorder())
    torch.testing.assert_close(method.alignment.average, GIVEN.mean(0))
    expected = sharpened(aligned(method, GIVEN))
    assert output.losses["unmixed"].item() == pytest.approx(unmixed(method, batch, expected), rel=1e-6)
    assert torch.equal(output.pseudo_labels, expected.argmax(1))


def test_a_balancer_that_aligns_takes_the_place_of_the_alignment():
    method, _, batch, output = run(Recorder(aligns=True))
    assert not method.alignment.started
    assert output.losses["unmixed"].item() == pytest.approx(unmixed(method, batch, sharpened(GIVEN)), rel=1e-6)


def test_a_balancer_on_targets_sees_them_and_has_the_last_word():
    balancer = Recorder(on_targets=True)
    method, _, batch, output = run(balancer)
    weak = build().network(batch.view(2))[1].softmax(1)
    torch.testing.assert_close(balancer.rows.weak_logits.softmax(1), sharpened(aligned(method, weak)))
    assert output.losses["unmixed"].item() == pytest.approx(unmixed(method, batch, GIVEN), rel=1e-6)
    assert torch.equal(output.pseudo_labels, GIVEN.argmax(1))


def test_what_a_balancer_is_shown_and_what_it_adds():
    balancer = Recorder()
    method, averaged, batch, output = run(balancer)
    plain = build()
    torch.testing.assert_close(balancer.rows.weak_features, plain.network(batch.view(2))[0])
    torch.testing.assert_close(balancer.rows.strong_features, plain.network(batch.view(0))[0])
    assert balancer.rows.strong_features.requires_grad and not balancer.rows.weak_features.requires_grad
    assert not balancer.rows.weak_logits.requires_grad
    images = torch.cat([batch.labeled_images, batch.view(2), batch.view(0)])
    assert torch.equal(balancer.images, images)
    assert balancer.rows.averaged_features.shape == (3 * B, FEATURES)
    torch.testing.assert_close(balancer.rows.averaged_features, averaged.backbone(images))
    assert output.losses["extra"].item() == pytest.approx(balancer.rows.strong_features.sum().item())
    assert output.total.item() == pytest.approx(sum(v.item() for k, v in output.losses.items() if k != "total"))
    assert balancer.seen_phase == "late" and method.phase(3) == Phase(False, "early")


def test_a_generation_begins_its_average_and_its_ramp_anew():
    method = build(balancer=CReST(torch.tensor([9, 4, 3]), steps=STEPS, generations=2))
    averaged = Network(balanced_head=False).double().eval()
    method.bind(averaged)

    def ramp(t: int) -> float:
        losses = method(make_batch(), torch.tensor(t), method.phase(t)).losses
        logits = build().network(make_batch().view(0))[1]
        return (losses["unmixed"] / method.lambda_kl / F.cross_entropy(logits, sharpened(seen[-1]))).item()

    seen = []
    forward = method.alignment.forward
    method.alignment.forward = lambda p: seen.append(forward(p)) or seen[-1]
    # A generation has 320 steps and rises in 320 / 64 = 5 of them.
    assert [ramp(t) for t in (0, 2, 5, 319, 320, 321)] == pytest.approx([0, 0.4, 1, 1, 0, 0.2], rel=1e-6)
    assert [t for t in range(STEPS) if method.refresh_due(t)] == [320]
    assert method.alignment.started
    context = context_of(
        lambda network, images: (None, torch.ones(1, K)),
        pool=torch.zeros(1),
        unlabeled=torch.tensor([0]),
        labeled=torch.arange(16),
        labels=torch.zeros(16, dtype=torch.int64),
    )
    assert method.refresh(context).labeled.tolist() == list(range(16))  # 0.69 of one image of class 0 is none
    assert not method.alignment.started


def sharp_loss(balancer: Balancer | None, dtype: torch.dtype) -> float:
    """The loss of the first strong view of sharply drawn targets, whose predictions are far from certain."""
    method = build(balancer=balancer, sharpening=0.002, dtype=dtype)
    method.network.head.weight.data.mul_(0.1)
    torch.manual_seed(1)
    method.bind(Network(balanced_head=False).to(dtype).eval())
    return method(make_batch(dtype=dtype), torch.tensor(400), method.phase(400)).losses["unmixed"].item()


@pytest.mark.parametrize("part", [lambda: None, lambda: DARP(COUNTS, N_ULB, start=0)], ids=["alone", "darp"])
def test_sharp_targets_of_float32_are_those_of_float64(part):
    """0.6^500 is no float32; a target that is 0 then has a logarithm of -inf in front of the balancer."""
    assert sharp_loss(part(), torch.float32) == pytest.approx(sharp_loss(part(), torch.float64), rel=1e-3)


def test_daso_takes_sharp_targets():
    assert math.isfinite(sharp_loss(DASO(K, FEATURES, start=0, t_dist=0.02), torch.float32))
