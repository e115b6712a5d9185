"""ReMixMatch's step against float64 loops written from methods.md D, on a network of one convolution."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from no_synchronization import NoSynchronization
from torch import nn

from bacon_fast.data.philox import Stream, uniform
from bacon_fast.methods.abc import ABC
from bacon_fast.methods.alignment import DistributionAlignment
from bacon_fast.methods.bacon import BaCon
from bacon_fast.methods.extended import Phase
from bacon_fast.methods.mixup import draw_quarter_turns
from bacon_fast.methods.outputs import Batch
from bacon_fast.methods.remixmatch import ReMixMatch
from bacon_fast.models.batchnorm import BatchNorm2d

B, K, FEATURES, SIDE, SEED, STEPS = 5, 3, 4, 6, 11, 640  # ramps in 640 / 64 = 10 steps
COUNTS = torch.tensor([9, 4, 3])
N_LB, N_ULB = 16, 20


class Backbone(nn.Module):
    num_features = FEATURES

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, FEATURES, 3, padding=1, bias=False)
        self.bn = BatchNorm2d(FEATURES, momentum=0.1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(self.bn(self.conv(images)), 0.1).mean((2, 3))


class Network(nn.Module):
    def __init__(self, balanced_head: bool) -> None:
        super().__init__()
        self.backbone, self.head = Backbone(), nn.Linear(FEATURES, K)
        self.balanced_head = nn.Linear(FEATURES, K) if balanced_head else None
        for head in (self.head, self.balanced_head):
            if head is not None:
                nn.init.normal_(head.weight, std=6)

    def forward(self, images: torch.Tensor) -> tuple:
        features = self.backbone(images)
        return features, self.head(features), None if self.balanced_head is None else self.balanced_head(features)


def build(*parts: str, dtype: torch.dtype = torch.float64, contrast_start: float = 1 / 30, **changes) -> ReMixMatch:
    torch.manual_seed(0)
    abc = regularizer = None
    if "abc" in parts:
        abc = ABC(COUNTS, threshold=0.6, lambda_abc=0.7, steps=STEPS, epochs=10, seed=SEED)
    if "bacon" in parts:
        sizes, thresholds = (FEATURES, K, N_LB, N_ULB), {"reliable_threshold": 0.4, "count_threshold": 0.4}
        when = {"steps": STEPS, "lambda_con": 0.9, "contrast_start": contrast_start}
        regularizer = BaCon(*sizes, **when, **thresholds, proj_dim=3, backend="reference")
    options = {"lambda_u": 1.7, "lambda_kl": 0.6, "lambda_rot": 0.4, "alignment_momentum": 0.8}
    options |= {"rampup": 1 / 64, "sharpening": 0.5, "mixup_alpha": 0.75}
    options |= {"steps": STEPS, "seed": SEED, "abc": abc, "regularizer": regularizer} | changes
    return ReMixMatch(Network("abc" in parts), COUNTS, **options).to(dtype)


def make_batch(seed: int = 1, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4 * B, 3, SIDE, SIDE, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, K, (B,), generator=generator)
    slots = torch.randperm(N_LB, generator=generator)[:B], torch.randperm(N_ULB, generator=generator)[:B]
    return Batch(images, labels, *slots, torch.tensor([-1, 0, 1, 2, 0]))


# --- the oracle ------------------------------------------------------------------------------------------------------


def forward_pass(method: ReMixMatch, images: torch.Tensor) -> tuple:
    """Features, logits and balanced logits with the batch's own statistics, and what the running ones would take in."""
    network = method.network
    x = F.conv2d(images, network.backbone.conv.weight, padding=1)
    count = x.numel() // FEATURES
    mean = x.sum((0, 2, 3)) / count
    centered = x - mean[:, None, None]
    variance = (centered**2).sum((0, 2, 3)) / count
    bn = network.backbone.bn
    x = centered / (variance + bn.eps).sqrt()[:, None, None] * bn.weight[:, None, None] + bn.bias[:, None, None]
    features = torch.where(x > 0, x, 0.1 * x).sum((2, 3)) / SIDE**2
    logits = features @ network.head.weight.T + network.head.bias
    balanced = None
    if network.balanced_head is not None:
        balanced = features @ network.balanced_head.weight.T + network.balanced_head.bias
    return features, logits, balanced, (mean, variance * count / (count - 1))


def cross_entropy(logits: torch.Tensor, target: list[float]) -> torch.Tensor:
    """One row against a distribution."""
    log_sum = sum(v.exp() for v in logits).log()
    return sum(q * (log_sum - v) for v, q in zip(logits, target))


def one_hot(label: int, classes: int = K) -> list[float]:
    return [float(c == label) for c in range(classes)]


def oracle(method: ReMixMatch, batch: Batch, t: int, average: list[float] | None) -> tuple[dict, list[float], tuple]:
    """Losses of a step, the average prediction after it, and the statistics of the first mixed block."""
    step = torch.tensor(t)
    labeled, strong_0, strong_1, weak = (batch.images[k * B : (k + 1) * B] for k in range(4))
    y = batch.labels.tolist()

    with torch.no_grad():
        weak_features, weak_logits, weak_balanced, _ = forward_pass(method, weak)
    rows = [[float(v.exp() / row.exp().sum()) for v in row] for row in weak_logits]
    mean = [sum(row[c] for row in rows) / B for c in range(K)]
    average = mean if average is None else [0.8 * a + 0.2 * m for a, m in zip(average, mean)]
    frequency = [n / sum(COUNTS.tolist()) for n in COUNTS.tolist()]
    targets = []
    for row in rows:
        aligned = [p * (w + 1e-6) / (a + 1e-6) for p, w, a in zip(row, frequency, average)]
        sharpened = [(p / sum(aligned)) ** (1 / 0.5) for p in aligned]
        targets.append([p / sum(sharpened) for p in sharpened])

    _, strong_logits, strong_balanced, _ = forward_pass(method, strong_0)
    features, logits, balanced, _ = forward_pass(method, labeled)

    images = [*labeled, *strong_0, *strong_1, *weak]
    wanted = [one_hot(label) for label in y] + targets + targets + targets
    coefficient, permutation = method.mixup.draw(4 * B, step)
    keep, other = float(coefficient), permutation.tolist()
    mixed = [keep * images[i] + (1 - keep) * images[other[i]] for i in range(4 * B)]
    mixed_targets = [[keep * a + (1 - keep) * b for a, b in zip(wanted[i], wanted[other[i]])] for i in range(4 * B)]
    mixed_logits, statistics = [], []
    for k in range(4):
        _, block, _, block_statistics = forward_pass(method, torch.stack(mixed[k * B : (k + 1) * B]))
        mixed_logits += list(block)
        statistics.append(block_statistics)

    turns = draw_quarter_turns(B, SEED, step).tolist()
    rotated = torch.stack([image.rot90(turn, (1, 2)) for image, turn in zip(strong_0, turns)])
    rotation_logits = forward_pass(method, rotated)[0] @ method.rotation_head.weight.T + method.rotation_head.bias

    ramp = min(t / (STEPS / 64), 1.0)
    per_mixed = [cross_entropy(row, target) for row, target in zip(mixed_logits, mixed_targets)]
    losses = {
        "supervised": sum(per_mixed[:B]) / B,
        "unsupervised": 1.7 * ramp * sum(per_mixed[B:]) / (3 * B),
        "unmixed": 0.6 * ramp * sum(cross_entropy(r, q) for r, q in zip(strong_logits, targets)) / B,
        "rotation": 0.4 * sum(cross_entropy(r, one_hot(v, 4)) for r, v in zip(rotation_logits, turns)) / B,
    }
    if method.abc is not None:
        n = COUNTS.tolist()
        draws = uniform(SEED, t, Stream.ABC_LABELED, torch.arange(B)).tolist()
        kept = [draw < min(n) / n[label] for draw, label in zip(draws, y)]
        losses["abc_labeled"] = (
            0.7 * sum(cross_entropy(balanced[b], one_hot(y[b])) for b in range(B) if kept[b]) / B + 0 * balanced.sum()
        )
        draws = uniform(SEED, t, Stream.ABC_UNLABELED, torch.arange(B)).tolist()
        total, epoch = 0 * strong_balanced.sum(), t * 10 // STEPS
        for j in range(B):
            q = weak_balanced[j].softmax(0)
            guess = int(q.argmax())
            if q[guess] >= 0.6 and draws[j] < 1 - epoch / 10 * (1 - min(n) / n[guess]):
                total = total + cross_entropy(strong_balanced[j], one_hot(guess))
        losses["abc_unlabeled"] = 0.7 * total / B
    if method.regularizer is not None:
        trusted = (logits, weak_logits) if method.abc is None else (balanced, weak_balanced)
        output = copy.deepcopy(method.regularizer)
        output.projection = method.regularizer.projection  # the same parameters, to compare gradients
        losses["contrastive"] = (
            0.9
            * output(
                torch.cat([features, weak_features]),
                batch.labels,
                torch.cat(trusted),
                batch.labeled_slots,
                batch.unlabeled_slots,
                progress=t / STEPS,
                active=method.phase(t).contrast,
            ).loss
        )
    return losses, average, statistics[0]


# --- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [(), ("abc",), ("bacon",), ("abc", "bacon")], ids=lambda parts: "+".join(parts))
def test_the_step_against_loops(parts):
    """Losses, gradients, the average prediction and the running statistics, over steps in all parts of the ramp."""
    method, average = build(*parts), None
    parameters = dict(method.named_parameters())
    bn = method.network.backbone.bn
    running = bn.running_mean.clone(), bn.running_var.clone()
    for count, t in enumerate((0, 4, 25, 400)):
        batch = make_batch(seed=t)
        expected, average, (mean, variance) = oracle(method, batch, t, average)
        output = method(batch, torch.tensor(t), method.phase(t))
        assert output.losses.keys() == {"total", *expected}
        for name, value in expected.items():
            assert output.losses[name].item() == pytest.approx(value.item(), rel=1e-6, abs=1e-12), (t, name)
        total = sum(expected.values())
        assert output.total.item() == pytest.approx(total.item(), rel=1e-6)
        grads = [
            torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
            for loss in (output.total, total)
        ]
        for name, found, wanted in zip(parameters, *grads):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-9, msg=lambda m, at=(t, name): f"{at}: {m}")
        torch.testing.assert_close(method.alignment.average.tolist(), average)
        running = [0.9 * old + 0.1 * new.detach() for old, new in zip(running, (mean, variance))]
        torch.testing.assert_close([bn.running_mean, bn.running_var], running)
        assert bn.num_batches_tracked == count + 1
    if parts == ("abc", "bacon"):
        assert all(value > 0 for value in output.losses.values()), "every term takes part in the last step"


def test_weak_rows_train_the_projection_alone():
    """Their features come from a pass without graph: moving their anchors moves no other parameter (methods.md E.2)."""
    method = build("abc", "bacon", lambda_u=0.0, lambda_kl=0.0, lambda_rot=0.0)
    method(make_batch(), torch.tensor(0), method.phase(0))  # something in the bank
    seen = {}
    regularizer = method.regularizer.forward

    def spy(features, *args, **kwargs):
        seen["features"] = features
        return regularizer(features, *args, **kwargs)

    method.regularizer.forward = spy
    output = method(make_batch(), torch.tensor(400), Phase(contrast=True))
    assert output.losses["contrastive"] > 0
    for rows, has_graph in ((slice(0, B), True), (slice(B, 2 * B), False)):
        (gradient,) = torch.autograd.grad(
            seen["features"][rows].sum(), method.network.backbone.conv.weight, retain_graph=True, materialize_grads=True
        )
        assert gradient.any() == has_graph


def test_targets_against_a_loop_and_the_first_batch_sets_the_average():
    alignment = DistributionAlignment(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), momentum=0.9).double()
    generator, average = torch.Generator().manual_seed(0), None
    for _ in range(3):
        p = torch.rand(7, 3, generator=generator, dtype=torch.float64).softmax(1)
        mean = p.sum(0) / 7
        average = mean if average is None else 0.9 * average + 0.1 * mean
        expected = [[p[j, c] * ((0.5, 0.3, 0.2)[c] + 1e-6) / (average[c] + 1e-6) for c in range(3)] for j in range(7)]
        expected = torch.tensor([[v / sum(row) for v in row] for row in expected], dtype=torch.float64)
        torch.testing.assert_close(alignment(p), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(alignment.average, average, rtol=1e-6, atol=1e-9)


def test_pseudo_labels_and_their_statistics():
    method, batch = build(), make_batch()
    output = method(batch, torch.tensor(0), Phase(contrast=False))
    with torch.no_grad():
        p = forward_pass(method, batch.view(2))[1].softmax(1)
    q = p * (COUNTS / COUNTS.sum() + 1e-6) / (p.mean(0) + 1e-6)
    assert output.pseudo_labels.tolist() == q.argmax(1).tolist()
    assert output.stats["pseudo_known"] == 4  # one true label is unknown
    assert output.stats["pseudo_correct"] == sum(a == b for a, b in zip(q.argmax(1).tolist(), batch.true_labels))


def test_the_contrastive_loss_starts_after_its_share_of_the_run():
    method = build("abc", "bacon", contrast_start=1 / 32)
    assert [method.phase(t).contrast for t in (0, 20, 21, 639)] == [False, False, True, True]  # after 640 / 32 = 20
    assert not build("abc").phase(639).contrast
    output = method(make_batch(), torch.tensor(5), method.phase(5))
    output.total.backward()
    assert output.losses["contrastive"] == 0 and method.regularizer.projection.weight.grad is None


def test_blocks_must_be_of_equal_size():
    batch = make_batch()
    short = Batch(
        batch.images[: B + 3 * 4], batch.labels, batch.labeled_slots, batch.unlabeled_slots[:4], torch.zeros(4)
    )
    with pytest.raises(ValueError, match="batch: expected as many unlabeled rows as labeled ones, 5, found 4"):
        build()(short, torch.tensor(0), Phase(contrast=False))


@pytest.mark.parametrize("parts", [(), ("abc", "bacon")], ids=lambda parts: "+".join(parts))
def test_the_step_is_static(parts):
    method = build(*parts, dtype=torch.float32)
    addresses = {name: value.data_ptr() for name, value in method.state_dict().items()}
    with NoSynchronization():
        method(make_batch(dtype=torch.float32), torch.tensor(30), method.phase(30)).total.backward()
    assert {name: value.data_ptr() for name, value in method.state_dict().items()} == addresses
    assert all(p.grad is not None for p in method.parameters())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_gradients_of_all_passes(half):
    """The weights that autocast casts for the first pass, under no_grad, must not serve the passes that follow."""
    gradients, losses = [], []
    for enabled in (False, True):
        method = build("abc", "bacon", dtype=torch.float32)
        for t in (0, 30):
            method.zero_grad()
            with torch.autocast("cpu", dtype=half, enabled=enabled):
                output = method(make_batch(dtype=torch.float32), torch.tensor(t), method.phase(t))
            output.total.backward()
        assert {value.dtype for value in output.losses.values()} == {torch.float32}
        gradients.append(torch.cat([p.grad.flatten() for p in method.parameters()]))
        losses.append(output.total.item())
    assert math.isclose(*losses, rel_tol=0.05)
    assert F.cosine_similarity(*gradients, dim=0) > 0.98
