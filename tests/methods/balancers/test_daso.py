"""DASO against loops written from methods.md H, the queue against Python deques, and USB's errors behind their flag."""

import math
from collections import deque
from dataclasses import replace

import pytest
import torch
from balancer_cases import B, F, K, U, batch, random_labels, rows, softmax

from bacon_fast.methods.balancers.daso import DASO
from bacon_fast.methods.balancers.feature_queue import FeatureQueue
from bacon_fast.methods.last_rows import last_of_equal


def daso(**changes) -> DASO:
    values = {"start": 2, "t_dist": 1.5, "interval": 3, "queue_length": 5}
    return DASO(changes.pop("num_classes", K), F, **(values | changes))


def features(seed: int, size: int = B) -> torch.Tensor:
    return torch.randn(size, F, generator=torch.Generator().manual_seed(seed))


def step_rows(step: int, **changes):
    return rows(step, averaged_features=features(100 + step), batch=batch(random_labels(step)), **changes)


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def similarities(row: list[float], prototypes: list[list[float] | None], absent: float) -> list[float]:
    return [(absent if c is None else cosine(row, c)) / 0.05 for c in prototypes]


class Loop:
    """DASO of one run, start 2 and interval 3, as plain Python: deques and the formulas of methods.md H.

    With `usb` as semilearn 0.3.0 to 0.3.2 does: the blend has q of the batch before, L_align is there one step before
    it, nothing is counted at the start, and a class without features has cosine 0, that of a vector of zeros.
    """

    def __init__(self, t_dist: float = 1.5, usb: bool = False):
        self.usb, self.previous_q = usb, None
        self.queues = [deque(maxlen=5) for _ in range(K)]
        self.distribution, self.counts, self.t_dist = [1 / K] * K, [0] * K, t_dist

    def step(self, t: int, seen) -> tuple[list[list[float]], float | None]:
        """p' of each row, and L_align where there is one."""
        for row, label in zip(seen.averaged_features.tolist(), seen.batch.labels.tolist()):
            self.queues[label].append(row)
        prototypes = [[sum(v) / len(q) for v in zip(*q)] if q else None for q in self.queues]
        answer, align, semantic = [], 0.0, []
        aligns, absent = t >= (1 if self.usb else 2), 0.0 if self.usb else -1.0
        columns = seen.weak_logits, seen.weak_features, seen.strong_features
        for j, (logits, weak, strong) in enumerate(zip(*(column.tolist() for column in columns))):
            p, q = softmax(logits), softmax(similarities(weak, prototypes, absent))
            semantic.append(q)
            if t >= 2:
                share = [m ** (1 / self.t_dist) for m in self.distribution]
                v = share[p.index(max(p))] / max(share)
                p = [(1 - v) * a + v * b for a, b in zip(p, self.previous_q[j] if self.usb else q)]
            r = softmax(similarities(strong, prototypes, absent))
            align -= sum(a * math.log(b) for a, b in zip(q, r)) / U
            answer.append(p)
            self.counts[p.index(max(p))] += 1
        self.previous_q = semantic
        if (t + 1) % 3 == 0 or (t + 1 == 2 and not self.usb):
            self.distribution, self.counts = [c / sum(self.counts) for c in self.counts], [0] * K
        return answer, align if aligns else None


@pytest.mark.parametrize("usb", [False, True], ids=["corrected", "usb"])
@pytest.mark.parametrize("t_dist", [1.5, 0.3])
def test_targets_and_loss_against_a_loop_over_the_start_and_two_counts(t_dist, usb):
    method, loop = daso(t_dist=t_dist, usb_rows=U if usb else None), Loop(t_dist, usb)
    for t in range(8):
        labels = random_labels(t)
        labels[labels == K - 1] = 0  # the last class never has a prototype
        seen = rows(t, averaged_features=features(100 + t), batch=batch(labels))
        targets = method(seen, torch.tensor(t), method.phase(t))
        expected, align = loop.step(t, seen)
        torch.testing.assert_close(targets.probabilities, torch.tensor(expected), rtol=1e-4, atol=1e-6)
        assert method.distribution.tolist() == pytest.approx(loop.distribution)
        assert method.counts.tolist() == loop.counts
        if align is None:
            assert not targets.losses
        else:
            assert targets.losses["align"].item() == pytest.approx(align, rel=1e-4)
        if usb and align is not None:
            torch.testing.assert_close(targets.confidence, seen.weak_logits.softmax(1).amax(1))
        else:
            assert targets.confidence is None, "the confidence is that of the blended probabilities"
    assert len({round(m, 6) for m in loop.distribution}) > 1, "the case must tell classes apart"


def test_gradient_of_the_alignment_reaches_the_strong_features_alone_and_is_autograds_in_double():
    method = daso(start=0)
    seen = step_rows(0)
    weak = seen.weak_features.requires_grad_()
    loss = method(seen, torch.tensor(0), (True, True)).losses["align"]
    loss.backward()
    assert weak.grad is None
    prototypes, present = method.queue.prototypes()
    unit = torch.nn.functional.normalize(prototypes.double())

    def logits(x):
        return torch.where(present, torch.nn.functional.normalize(x) @ unit.T, -1.0) / 0.05

    def alignment(strong):
        q = logits(seen.weak_features.detach().double()).softmax(1)
        return -(q * logits(strong).log_softmax(1)).sum(1).mean()

    strong = seen.strong_features.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(alignment, strong)
    (expected,) = torch.autograd.grad(alignment(strong), strong)
    torch.testing.assert_close(seen.strong_features.grad.double(), expected, rtol=1e-3, atol=1e-6)


def test_queue_against_deques_with_wrap_around_and_batches_longer_than_it():
    queue, expected = FeatureQueue(3, F, 4), [deque(maxlen=4) for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    for size in (1, 5, 2, 17, 3, 9):
        labels = torch.randint(0, 2, (size,), generator=generator)  # class 2 never
        new = torch.randn(size, F, generator=generator)
        queue.enqueue(new, labels)
        for row, label in zip(new, labels.tolist()):
            expected[label].append(row)
        prototypes, present = queue.prototypes()
        for c, rows_of_class in enumerate(expected):
            assert present[c] == bool(rows_of_class)
            mean = torch.stack(list(rows_of_class)).mean(0) if rows_of_class else torch.zeros(F)
            torch.testing.assert_close(prototypes[c], mean)
            held = {tuple(row) for row in queue.features[c][: len(rows_of_class)].tolist()}
            assert held == {tuple(row.tolist()) for row in rows_of_class}


def test_last_of_equal():
    assert last_of_equal(torch.tensor([3, 1, 3, 2, 1, 3])).tolist() == [5, 4, 5, 3, 4, 5]
    assert last_of_equal(torch.tensor([8])).tolist() == [0]


def test_a_class_without_features_is_never_the_nearest():
    method = daso(start=0)
    seen = rows(averaged_features=-features(1).abs(), batch=batch(torch.zeros(B, dtype=torch.int64)))
    seen = replace(seen, weak_features=seen.weak_features.abs())  # every cosine with the only prototype is negative
    targets = method(seen, torch.tensor(0), (True, True))
    assert (targets.probabilities.argmax(1) == 0).all(), "uniform counts: p' is q"
    assert targets.losses["align"].isfinite()


def test_usb_begins_with_the_loss_and_blends_a_step_later():
    """What the flag changes in time, each seen on its own, around a start that ends no interval."""
    corrected, usb = daso(start=5), daso(start=5, usb_rows=U)
    assert [corrected.phase(t) for t in (3, 4, 5)] == [(False, False), (False, False), (True, True)]
    assert [usb.phase(t) for t in (3, 4, 5)] == [(False, False), (True, False), (True, True)]
    seen = step_rows(4)
    first = usb(seen, torch.tensor(4), usb.phase(4))
    assert torch.equal(first.probabilities, seen.weak_logits.softmax(1)) and first.losses["align"] > 0
    assert usb.counts.sum() == U, "no count at the start: its rows wait for the end of the interval"
    corrected(seen, torch.tensor(4), corrected.phase(4))
    assert corrected.counts.sum() == 0, "counted at the start"


def test_two_classes_and_half_precision_features():
    labels = torch.tensor([0, 1, 0, 1, 1, 0, 0])
    seen = rows(num_classes=2, averaged_features=features(3), batch=batch(labels))
    weak, strong = seen.weak_features.bfloat16(), seen.strong_features.bfloat16()
    half = replace(seen, weak_features=weak, strong_features=strong)
    one, two = (daso(start=0, num_classes=2)(s, torch.tensor(0), (True, True)) for s in (seen, half))
    assert two.losses["align"].dtype == torch.float32
    torch.testing.assert_close(one.losses["align"], two.losses["align"], rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("t_dist", "num_classes"), [(0.01, K), (0.06, 1000)])
def test_a_small_t_dist_favors_the_commonest_class_alone(t_dist, num_classes):
    """(1/K)^(1/T) is no float32; relative to the largest it is 1, or 0 for classes that are clearly rarer."""
    method = daso(start=0, t_dist=t_dist, num_classes=num_classes)
    seen = rows(num_classes=num_classes, averaged_features=features(1), batch=batch(random_labels(0)))
    targets = method(seen, torch.tensor(0), (True, True))
    assert torch.equal(
        targets.probabilities, method._similarity(seen.weak_features, *method.queue.prototypes()).softmax(1)
    )
    method.distribution.copy_(torch.full((num_classes,), 0.5 / num_classes))
    method.distribution[0] += 0.5
    targets = method(seen, torch.tensor(1), (True, True))
    rare = seen.weak_logits.argmax(1) != 0
    assert rare.any()
    torch.testing.assert_close(targets.probabilities[rare], seen.weak_logits.softmax(1)[rare])
