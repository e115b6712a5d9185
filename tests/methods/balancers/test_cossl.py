"""CoSSL against loops written from methods.md H: blending, teacher, warm-up, and USB's errors behind their flag."""

import copy
from dataclasses import replace

import pytest
import torch
from balancer_cases import B, F, K, U, batch, cross_entropy, random_labels, rows, softmax
from refresh_cases import context_of
from scipy.stats import beta

from bacon_fast.data.philox import Stream, philox
from bacon_fast.methods.balancers.cossl import CoSSL
from bacon_fast.methods.balancers.cossl_warmup import balanced_features, imprinted_weights, train_head

COUNTS = [40, 20, 10, 4]


def cossl(counts=tuple(COUNTS), num_classes: int = K, **changes) -> CoSSL:
    method = CoSSL(torch.tensor(counts), **({"start": 5, "lambda_0": 0.6, "seed": 3} | changes))
    torch.manual_seed(0)
    network, averaged = (torch.nn.Module() for _ in range(2))
    for module in (network, averaged):
        module.balanced_head = torch.nn.Linear(F, num_classes)
        module.register_buffer("teacher_ready", torch.tensor(False))
    averaged.requires_grad_(False)
    method.bind(network, averaged)
    return method


def step_rows(seed: int = 0, **changes):
    generator = torch.Generator().manual_seed(seed + 50)
    averaged = torch.randn(B + 2 * U, F, generator=generator)
    y = torch.randint(0, K, (B,), generator=generator)
    return rows(seed, averaged_features=averaged, batch=replace(batch(random_labels()), balanced_labels=y), **changes)


def test_before_the_start_the_base_learner_labels_for_itself():
    method, seen = cossl(), rows()
    assert [method.phase(t) for t in (0, 4, 5, 9)] == [False, False, True, True]
    assert [method.refresh_due(t) for t in (0, 4, 5, 6)] == [False, False, True, False]
    targets = method(seen, torch.tensor(0), False)
    assert torch.equal(targets.probabilities, seen.weak_logits.softmax(1)) and not targets.losses


def test_teacher_labels_and_learns_as_the_loop():
    method, seen, step = cossl(), step_rows(), 7
    targets = method(seen, torch.tensor(step), True)
    head = method.network.balanced_head
    labeled, weak, strong = seen.averaged_features.double().split([B, U, U])
    weight, bias = head.weight.detach().double(), head.bias.detach().double()

    def logits(f):
        return [float(w @ f + b) for w, b in zip(weight, bias)]

    for j in range(U):
        assert targets.probabilities[j].tolist() == pytest.approx(softmax(logits(weak[j])), rel=1e-4)
    words = philox(3, step, Stream.COSSL_BLEND, torch.arange(B), 2)
    loss, blended = 0.0, 0
    for b in range(B):
        y, f = int(seen.batch.balanced_labels[b]), labeled[b]
        first, second = ((int(w) >> 8) / 2**24 for w in words[b])
        if first < (COUNTS[0] - COUNTS[y]) / COUNTS[0]:
            share = 0.6 + 0.4 * second
            f = share * f + (1 - share) * strong[b]
            blended += 1
        loss += cross_entropy(logits(f), y) / B
    assert 0 < blended < B, "the case must have both kinds of rows"
    assert targets.losses["teacher"].item() == pytest.approx(loss, rel=1e-5)


def test_gradient_reaches_the_teacher_alone():
    method, seen = cossl(), step_rows()
    targets = method(seen, torch.tensor(7), True)
    assert not targets.probabilities.requires_grad
    targets.losses["teacher"].backward()
    assert seen.strong_features.grad is None
    assert all(p.grad.any() for p in method.network.balanced_head.parameters())


def test_rows_are_blended_as_often_and_as_far_as_specified():
    method = cossl(lambda_0=0.6)
    labels = torch.arange(4).repeat_interleave(20_000)
    ones, zeros = torch.ones(len(labels), 1), torch.zeros(len(labels), 1)
    share = method.blend(ones, zeros, labels, torch.tensor(0))[:, 0].view(4, -1)  # of the labeled feature
    for c, wanted in enumerate([0, 0.5, 0.75, 0.9]):
        blended = share[c][share[c] < 1]
        assert len(blended) / 20_000 == pytest.approx(wanted, abs=0.018)  # five standard deviations
        if c:
            assert 0.6 <= blended.min() < 0.61 and blended.max() > 0.99
            assert blended.mean().item() == pytest.approx(0.8, abs=0.01)


def test_usb_blends_nothing_where_class_0_is_the_head_and_does_not_exchange_pseudo_labels():
    fixed, usb, seen = cossl(), cossl(usb_compat=True), step_rows()
    assert fixed.blend_probability.tolist() == pytest.approx([0, 0.5, 0.75, 0.9])
    assert usb.blend_probability.tolist() == [0] * 4
    labeled, _, strong = seen.averaged_features.split([B, U, U])
    y = seen.batch.balanced_labels
    assert torch.equal(usb.blend(labeled, strong[:B], y, torch.tensor(7)), labeled)
    assert not torch.equal(fixed.blend(labeled, strong[:B], y, torch.tensor(7)), labeled)
    own = seen.weak_logits.softmax(1)
    assert torch.equal(usb(seen, torch.tensor(7), True).probabilities, own)
    assert not torch.allclose(fixed(seen, torch.tensor(7), True).probabilities, own)
    # Where the head is another class, its error blends everything alike.
    assert cossl((10, 40), 2, usb_compat=True).blend_probability.tolist() == pytest.approx([0.75, 0.75])


def test_imprinted_weights_against_a_loop():
    features, labels = torch.randn(9, F), torch.tensor([0, 0, 1, 2, 2, 2, 1, 0, 2])
    for c, weight in enumerate(imprinted_weights(features, labels, 3)):
        mean = features[labels == c].mean(0)
        torch.testing.assert_close(weight, mean / mean.norm())


def test_balanced_features_against_a_loop():
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    labeled, unlabeled = torch.randn(10, F, generator=generator), torch.randn(15, F, generator=generator)
    weights = imprinted_weights(labeled, labels, 3)
    features, targets = balanced_features(labeled, labels, unlabeled, weights, seed=4)
    assert targets.bincount().tolist() == [6, 6, 6]
    assert torch.equal(features[:10], labeled) and torch.equal(targets[:10], labels)
    place = 10
    for c, missing in ((1, 3), (2, 5)):
        others = [(row, f) for row, f in enumerate([*labeled, *unlabeled]) if row >= 10 or labels[row] != c]
        others.sort(key=lambda item: -softmax((weights @ item[1]).tolist())[c])
        own = [f for f, y in zip(labeled, labels) if y == c]
        for i in range(missing):
            word, other_word = philox(4, 1 + c, Stream.COSSL_WARMUP, torch.tensor([i]), 2)[0].tolist()
            share = beta.ppf(other_word / 2**32, 0.75, 0.75)
            expected = share * own[word * len(own) >> 32] + (1 - share) * others[i][1]
            torch.testing.assert_close(features[place], expected.float(), rtol=1e-4, atol=1e-5)
            assert targets[place] == c
            place += 1


def test_blends_start_over_when_there_are_fewer_other_features_than_missing_ones():
    labels = torch.tensor([0] * 8 + [1])
    features, targets = balanced_features(torch.randn(9, F), labels, torch.empty(0, F), torch.randn(2, F), seed=0)
    assert targets.bincount().tolist() == [8, 8] and features.isfinite().all()


def test_warm_up_learns_a_separable_set_the_same_each_time():
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(3).repeat(40)
    features = 4 * torch.nn.functional.one_hot(labels, F).float() + torch.randn(120, F, generator=generator)
    head = torch.nn.Linear(F, 3)
    start = head.weight.detach().clone()
    trained, mean = train_head(head, features, labels, seed=0)
    assert torch.equal(head.weight, start), "a copy is trained"
    again, _ = train_head(head, features, labels, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(trained, again))

    def loss(weights):
        return torch.nn.functional.cross_entropy(features @ weights[0].T + weights[1], labels)

    assert loss(trained) < loss(mean) < 0.9 * loss((start, head.bias))


def test_refresh_warms_up_both_heads_and_lets_them_predict():
    method = cossl((12, 4, 4, 2))
    labels = torch.tensor([0] * 12 + [1] * 4 + [2] * 4 + [3] * 2)
    with torch.inference_mode():
        stored = torch.randn(40, F, generator=torch.Generator().manual_seed(3))
    head = copy.deepcopy(method.network.balanced_head)

    def predict(network, images):
        assert network is method.averaged
        return stored[images], None

    context = context_of(
        predict, pool=torch.arange(40), unlabeled=torch.arange(22, 40), labeled=torch.arange(22), labels=labels
    )
    assert method.refresh(context) is None
    weights = imprinted_weights(stored[:22], labels, 4)
    features, targets = balanced_features(stored[:22], labels, stored[22:], weights, seed=3)
    trained, mean = train_head(head, features, targets, seed=3)
    assert not torch.equal(trained[0], mean[0])
    assert all(torch.equal(a, b) for a, b in zip(method.network.balanced_head.parameters(), trained))
    assert all(torch.equal(a, b) for a, b in zip(method.averaged.balanced_head.parameters(), mean))
    assert method.network.teacher_ready and method.averaged.teacher_ready


def test_a_class_without_labels_is_refused():
    with pytest.raises(ValueError, match=r"labeled_counts.*\[1\]"):
        cossl((3, 0, 2, 1))
