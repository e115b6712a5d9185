"""SsCL's queue, key bank, calibration and prototypes against loops written from methods.md F.3 and F.4."""

import itertools
import math
from collections import Counter, deque

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from bacon_fast.data.philox import Stream, philox
from bacon_fast.methods.sscl.calibration import CoCalibration
from bacon_fast.methods.sscl.key_bank import LabeledKeyBank, by_class
from bacon_fast.methods.sscl.prototypes import ClassPrototypes, class_means, draw_mixtures, mix_pixels, own_cosine
from bacon_fast.methods.sscl.queue import KeyQueue


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    vectors = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return vectors / vectors.norm(dim=-1, keepdim=True)


# --- queue ------------------------------------------------------------------------------------------------------------


def test_queue_is_a_ring_of_the_latest_keys():
    queue = KeyQueue(7, 4)
    start, address = queue.keys.clone(), queue.keys.data_ptr()
    ring, position = [(start[i], -1) for i in range(7)], 0
    for step, count in enumerate((3, 3, 3, 0, 7, 1, 16, 2)):  # wraps in the middle, exactly, and more than once
        keys, classes = unit(count, 4, seed=step), torch.arange(count) + 10 * step
        queue.enqueue_(keys, classes)
        for key, c in zip(keys, classes.tolist()):
            ring[position] = (key, c)
            position = (position + 1) % 7
        assert torch.equal(queue.keys, torch.stack([key for key, _ in ring]))
        assert queue.classes.tolist() == [c for _, c in ring]
        assert queue.position.item() == position
    assert queue.keys.data_ptr() == address


def test_queue_starts_with_random_unit_vectors_of_the_seeded_generator():
    torch.manual_seed(3)
    first = KeyQueue(500, 16)
    torch.manual_seed(3)
    assert torch.equal(first.keys, KeyQueue(500, 16).keys) and not torch.equal(first.keys, KeyQueue(500, 16).keys)
    torch.testing.assert_close(first.keys.norm(dim=1), torch.ones(500))
    assert first.keys.mean(0).norm() < 0.15, "random directions: their mean is short"
    assert set(first.state_dict()) == {"keys", "classes", "position"}


def test_queue_takes_half_precision_keys():
    queue = KeyQueue(4, 3)
    keys = unit(2, 3).bfloat16()
    queue.enqueue_(keys, torch.zeros(2, dtype=torch.int64))
    assert queue.keys.dtype == torch.float32 and torch.equal(queue.keys[:2], keys.float())


@pytest.mark.parametrize(("size", "dim", "name"), [(0, 4, "size"), (4, 0, "dim")])
def test_queue_refuses_empty_sizes(size, dim, name):
    with pytest.raises(ValueError, match=f"{name}: expected a positive integer, found 0"):
        KeyQueue(size, dim)


# --- labeled keys -----------------------------------------------------------------------------------------------------

LABELS = torch.tensor([2, 0, 2, 2, 4, 0, 2, 2])  # class 1 and 3 have no image, 4 has one, 0 two, 2 five


def filled_bank() -> LabeledKeyBank:
    bank = LabeledKeyBank(8, 5, 3)
    bank.fill_(unit(8, 3), LABELS)
    return bank


def test_by_class_orders_positions():
    slots, start, count = by_class(LABELS, 5)
    assert count.tolist() == [2, 0, 5, 0, 1]
    assert [slots[s : s + n].tolist() for s, n in zip(start, count)] == [[1, 5], [], [0, 2, 3, 6, 7], [], [4]]


def test_the_last_key_of_a_slot_stays():
    bank = filled_bank()
    before, keys = bank.keys.clone(), unit(5, 3, seed=1)
    bank.write_(torch.tensor([3, 0, 3, 7, 0]), keys)
    expected = before.clone()
    for slot, key in zip([3, 0, 3, 7, 0], keys):
        expected[slot] = key
    assert torch.equal(bank.keys, expected)


def test_drawn_keys_are_different_ones_of_the_class_and_every_subset_is_as_likely():
    bank, count = filled_bank(), 30_000
    slots, present = bank.draw(torch.full((count,), 2), 3, seed=5, step=torch.tensor(9))
    assert present.all()
    subsets = Counter(map(frozenset, slots.tolist()))
    assert set(subsets) == {frozenset(s) for s in itertools.combinations([0, 2, 3, 6, 7], 3)}
    assert chisquare(list(subsets.values())).pvalue > 1e-3
    single = Counter(bank.draw(torch.full((count,), 2), 1, seed=5, step=1)[0][:, 0].tolist())
    assert set(single) == {0, 2, 3, 6, 7} and chisquare(list(single.values())).pvalue > 1e-3


def test_classes_with_few_keys_give_all_they_have():
    bank = filled_bank()
    slots, present = bank.draw(torch.tensor([0, 1, 2, 3, 4] * 20), 3, seed=0, step=2)
    for row, mask, c in zip(slots.tolist(), present.tolist(), [0, 1, 2, 3, 4] * 20):
        drawn = [slot for slot, there in zip(row, mask) if there]
        members = (c == LABELS).nonzero().flatten().tolist()
        assert len(drawn) == min(3, len(members)) == len(set(drawn)) and set(drawn) <= set(members)
        assert all(0 <= slot < 8 for slot in row), "an absent key still has a slot that can be read"


def test_draws_change_with_the_step_and_an_empty_bank_gives_nothing():
    bank, classes = filled_bank(), torch.full((50,), 2)
    draws = [bank.draw(classes, 2, seed=1, step=s)[0] for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    slots, present = bank.draw(classes, 0, seed=1, step=0)
    assert slots.shape == present.shape == (50, 0)
    assert not LabeledKeyBank(8, 5, 3).draw(classes, 3, seed=1, step=0)[1].any()


# --- calibration ------------------------------------------------------------------------------------------------------


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(v - max(row)) for v in row]
    return [p / sum(powers) for p in powers]


@pytest.mark.parametrize("mode", ["ratio", "literal"])
def test_calibration_against_a_loop(mode):
    classes, window, batch = 4, 3, 5
    calibration = CoCalibration(classes, mode=mode, temperature=0.1, window=window)
    history = deque([[1 / classes] * classes] * window, maxlen=window)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2 * window + 1):
        logits = 2 * torch.randn(batch, classes, generator=generator)
        similarity = 2 * torch.rand(batch, classes, generator=generator) - 1
        similarity[:, 3] = -1  # a class without prototype
        pi = [softmax([s / 0.1 for s in row]) for row in similarity.tolist()]
        history.append([sum(p[c] for p in pi) / batch for c in range(classes)])
        mean = [sum(row[c] for row in history) / window for c in range(classes)]
        result = calibration(logits, similarity)
        for j in range(batch):
            p = softmax(logits[j].tolist())
            if mode == "ratio":
                scale = [pi[j][c] / (mean[c] + 1e-6) for c in range(classes)]
                scale = [s / sum(scale) for s in scale]
            else:
                scale = mean
            product = [p[c] * scale[c] for c in range(classes)]
            expected = [v / sum(product) for v in product]
            assert result[j].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("mode", ["ratio", "literal"])
@pytest.mark.parametrize("similarity_is", ["softmax", "cosine"])
@pytest.mark.parametrize("window_start", ["uniform", "empty"])
def test_the_papers_readings_of_the_calibration_against_a_loop(mode, similarity_is, window_start):
    classes, window, batch = 4, 3, 5
    options = {"similarity": similarity_is, "window_start": window_start}
    calibration = CoCalibration(classes, mode=mode, temperature=0.1, window=window, **options)
    history = deque([[1 / classes] * classes] * window if window_start == "uniform" else [], maxlen=window)
    generator = torch.Generator().manual_seed(3)
    for _ in range(2 * window):
        logits = 2 * torch.randn(batch, classes, generator=generator)
        cosines = 2 * torch.rand(batch, classes, generator=generator) - 1
        scores = [
            softmax([s / 0.1 for s in row]) if similarity_is == "softmax" else [max(s, 1e-6) for s in row]
            for row in cosines.tolist()
        ]
        history.append([sum(row[c] for row in scores) / batch for c in range(classes)])
        mean = [sum(row[c] for row in history) / len(history) for c in range(classes)]
        result = calibration(logits, cosines)
        for j in range(batch):
            p = softmax(logits[j].tolist())
            scale = [scores[j][c] / (mean[c] + 1e-6) for c in range(classes)] if mode == "ratio" else mean
            product = [p[c] * scale[c] for c in range(classes)]
            assert result[j].tolist() == pytest.approx([v / sum(product) for v in product], rel=1e-4, abs=1e-7)


def test_similarities_that_say_nothing_leave_the_prediction():
    calibration, logits = CoCalibration(3), torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    for _ in range(5):
        torch.testing.assert_close(calibration(logits, torch.full((6, 3), 0.7)), logits.softmax(1))


def test_the_two_readings_disagree_about_popular_classes():
    """All images are alike to class 0: "ratio" sees nothing special in that, "literal" makes class 0 more likely."""
    logits, similarity = torch.zeros(4, 2), torch.tensor([[0.5, 0.2]]).expand(4, 2)
    for mode, expected in (("ratio", 0.5), ("literal", 1 / (1 + math.exp(-3)))):
        calibration = CoCalibration(2, mode=mode, window=2)
        for _ in range(2):
            result = calibration(logits, similarity)
        assert result[0, 0].item() == pytest.approx(expected, abs=1e-3)


def test_calibration_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="mode: expected one of ratio, literal, found 'sum'"):
        CoCalibration(3, mode="sum")
    with pytest.raises(ValueError, match="similarity: expected one of softmax, cosine, found 'dot'"):
        CoCalibration(3, similarity="dot")
    with pytest.raises(ValueError, match="temperature: expected a number above 0, found 0"):
        CoCalibration(3, temperature=0)


def test_calibration_passes_no_gradient_and_keeps_its_storage():
    calibration = CoCalibration(3)
    address = calibration.history.data_ptr()
    result = calibration(torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3))
    assert not result.requires_grad and calibration.history.data_ptr() == address
    assert set(calibration.state_dict()) == {"history", "position"} and calibration.history.shape == (128, 3)


# --- prototypes -------------------------------------------------------------------------------------------------------


def test_class_means_against_numpy():
    features = unit(8, 6)
    vectors, present = class_means(features, LABELS, 5)
    for c in range(5):
        members = features.numpy().astype(np.float64)[LABELS.numpy() == c]
        assert bool(present[c]) == (len(members) > 0)
        expected = np.zeros(6)
        if len(members):
            expected = members.mean(0) / np.linalg.norm(members.mean(0))
        np.testing.assert_allclose(vectors[c].numpy(), expected, atol=1e-6)


def test_similarity_of_a_class_without_prototype_is_minus_one():
    prototypes = ClassPrototypes(3, 4, 2)
    vectors, unlabeled = unit(3, 4), unit(2, 4, seed=2)
    assert (prototypes.similarity(torch.ones(1, 4)) == -1).all(), "before the first refresh there is none"
    prototypes.set_(vectors, torch.tensor([True, False, True]), unlabeled, torch.tensor([2, 0]))
    features = 5 * torch.randn(4, 4, generator=torch.Generator().manual_seed(3))
    similarity = prototypes.similarity(features)
    for j, c in itertools.product(range(4), range(3)):
        a, b = features[j].double(), vectors[c].double()
        expected = -1.0 if c == 1 else float(a @ b / a.norm())
        assert similarity[j, c].item() == pytest.approx(expected, abs=1e-6)
    for j, c in ((0, 2), (1, 0)):
        assert prototypes.alpha[j].item() == pytest.approx(max(0.0, float(unlabeled[j] @ vectors[c])), abs=1e-6)
    assert prototypes.assigned.tolist() == [2, 0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prototypes.similarity(features), similarity), "not rounded to half precision"


def test_alpha_is_never_negative():
    prototypes = ClassPrototypes(2, 2, 1)
    prototypes.set_(torch.eye(2), torch.ones(2).bool(), torch.tensor([[-1.0, 0.0]]), torch.tensor([0]))
    assert prototypes.alpha.tolist() == [0.0]


def test_alpha_of_the_nearest_prototype_passes_over_classes_without_one():
    prototypes = ClassPrototypes(3, 2, 2, alpha_of="nearest")
    vectors = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    unlabeled = torch.tensor([[0.6, 0.8], [-0.6, -0.8]])
    prototypes.set_(vectors, torch.tensor([True, False, True]), unlabeled, torch.tensor([0, 1]))
    assert prototypes.alpha.tolist() == pytest.approx([0.8, 0.0]), "of class 2, not of class 0; never below 0"


def test_own_cosine_of_more_rows_than_one_chunk():
    features, vectors = unit(5000, 3), unit(4, 3, seed=1)
    classes = torch.arange(5000) % 4
    torch.testing.assert_close(own_cosine(features, vectors, classes), (features @ vectors.T)[range(5000), classes])


def test_mixtures_against_a_loop_with_the_same_draws():
    generator = torch.Generator().manual_seed(4)
    # Class 0 has two labeled images and many unlabeled, 2 has five and three, 4 has one and none, 1 and 3 have none.
    assigned = torch.tensor([0] * 9 + [2] * 3 + [1] * 4)[torch.randperm(16, generator=generator)]
    nearness = torch.rand(16, generator=generator)
    labeled, unlabeled, classes, weight = draw_mixtures(LABELS, assigned, nearness, 5, seed=8, step=30)

    words = philox(8, 30, Stream.SSCL_MIXTURE, torch.arange(8), 3).tolist()
    expected = []
    for i, c in enumerate(LABELS.tolist()):
        members = [j for j in range(8) if LABELS[j] == c]
        ranked = sorted((j for j in range(16) if assigned[j] == c), key=lambda j: -nearness[j])
        near = ranked[: len(members)]
        if near:
            a, b, w = words[i]
            pick = members[a * len(members) >> 32], near[b * len(near) >> 32]
            expected.append((*pick, c, (w >> 8) / 2**24))
    assert list(zip(labeled.tolist(), unlabeled.tolist(), classes.tolist(), weight.tolist())) == expected
    assert len(expected) == 7, "class 4 has no partner"


def test_mixtures_reach_every_near_partner_and_no_other():
    labels, assigned = torch.zeros(400, dtype=torch.int64), torch.zeros(1000, dtype=torch.int64)
    nearness = torch.rand(1000, generator=torch.Generator().manual_seed(5))
    labeled, unlabeled, _, weight = draw_mixtures(labels, assigned, nearness, 1, seed=0, step=0)
    near = set(nearness.topk(400).indices.tolist())
    assert set(unlabeled.tolist()) <= near and len(set(unlabeled.tolist())) > 200 < len(set(labeled.tolist()))
    assert weight.mean().item() == pytest.approx(0.5, abs=0.06) and weight.var().item() == pytest.approx(
        1 / 12, abs=0.02
    )


def test_no_unlabeled_image_of_any_labeled_class_means_no_mixture():
    result = draw_mixtures(torch.tensor([0, 0]), torch.tensor([1, 1, 1]), torch.rand(3), 2, seed=0, step=0)
    assert [len(part) for part in result] == [0, 0, 0, 0]


def test_mixed_pixels_are_the_nearest_levels():
    generator = torch.Generator().manual_seed(6)
    a, b = (torch.randint(0, 256, (2, 3, 4, 3), generator=generator, dtype=torch.uint8) for _ in range(2))
    weight = torch.tensor([0.3, 0.9])
    mixed = mix_pixels(a, b, weight)
    exact = weight.double()[:, None, None, None] * a + (1 - weight.double())[:, None, None, None] * b
    assert mixed.dtype == torch.uint8 and (mixed - exact).abs().max() <= 0.5 + 1e-4
