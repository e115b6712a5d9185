"""CReST's selection and alignment against loops written from methods.md H, and USB's rank by index behind its flag."""

import pytest
import torch
from balancer_cases import K, U, rows, softmax
from refresh_cases import context_of

from bacon_fast.methods.balancers.crest import CReST, select, selected_fractions, selected_fractions_by_index


def crest(counts=(40, 20, 10, 5), **changes) -> CReST:
    return CReST(torch.tensor(counts), **({"steps": 60, "generations": 6} | changes))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([100, 10, 1], [0.01, 0.1, 1.0]),
        ([1, 10, 100], [1.0, 0.1, 0.01]),  # ranked by count, whatever the order of the classes
        ([10, 100, 1], [0.1, 0.01, 1.0]),
        ([5, 5], [1.0, 1.0]),
        ([7], [1.0]),
    ],
)
def test_the_rarest_class_takes_all_and_the_commonest_the_smallest_fraction(counts, expected):
    assert selected_fractions(counts, alpha=1) == pytest.approx(expected)
    assert selected_fractions(counts, alpha=3) == pytest.approx([v ** (1 / 3) for v in expected])


def test_usb_ranks_by_index_so_that_only_descending_counts_come_out_right():
    geometric = [round(1000 * 0.5**k) for k in range(6)]
    assert selected_fractions_by_index(geometric, 3) == pytest.approx(selected_fractions(geometric, 3), rel=0.01)
    ascending = geometric[::-1]
    assert selected_fractions(ascending, 3)[-1] == min(selected_fractions(ascending, 3))
    assert selected_fractions_by_index(ascending, 3)[-1] == 1, "the commonest class takes all"
    assert crest((1, 10, 100)).fractions[2] == pytest.approx(0.01 ** (1 / 3))
    assert crest((1, 10, 100), usb_compat=True).fractions == pytest.approx([0.01 ** (1 / 3), 0.1 ** (1 / 3), 1])


def test_selection_against_a_loop():
    probabilities = (2 * torch.randn(50, 4, generator=torch.Generator().manual_seed(0))).softmax(1)
    probabilities[:, 3] = 0  # a class that is never predicted
    fractions = [0.2, 0.55, 1.0, 1.0]
    slots, classes = select(*probabilities.max(1), fractions)
    expected = []
    for k in range(4):
        members = [m for m in range(50) if probabilities[m].tolist().index(max(probabilities[m].tolist())) == k]
        members.sort(key=lambda m: -max(probabilities[m].tolist()))
        expected += [(m, k) for m in members[: int(fractions[k] * len(members))]]
    assert list(zip(slots.tolist(), classes.tolist())) == sorted(expected)
    assert {k for _, k in expected} == {0, 1, 2}


def test_selection_of_nothing_and_of_everything():
    confidence, classes = torch.ones(3), torch.arange(3)
    assert [part.tolist() for part in select(confidence, classes, [0.5] * 3)] == [[], []]
    assert [part.tolist() for part in select(confidence, classes, [1.0] * 3)] == [[0, 1, 2], [0, 1, 2]]
    zeros = torch.zeros(10, dtype=torch.int64)
    assert select(torch.ones(10), zeros, [0.3, 1.0])[0].tolist() == [0, 1, 2]  # 0.3 * 10 is 3, not 2.99


def test_each_generation_begins_with_the_original_labeled_set_and_the_averaged_networks_choice():
    method = crest((3, 1), steps=12, generations=3)  # fractions (1/3)^(1/3) = 0.69 and 1
    averaged = torch.nn.Module()
    method.bind(torch.nn.Module(), averaged)
    pool, labeled, unlabeled = torch.arange(100, 120), torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11, 12, 13, 14])
    labels = torch.tensor([0, 0, 0, 1])
    for logits, slots, classes in (
        ([[3, 0], [2, 0], [1, 0], [0, 1], [0, 2]], [0, 1, 3, 4], [0, 0, 1, 1]),  # floor(0.69 * 3) = 2 of class 0
        ([[0, 1], [0, 1], [0, 1], [0, 1], [5, 0]], [0, 1, 2, 3], [1, 1, 1, 1]),  # floor(0.69 * 1) = 0 of class 0
    ):

        def predict(asked, images, logits=logits):
            assert asked is averaged and images.tolist() == [110, 111, 112, 113, 114]
            return None, torch.tensor(logits, dtype=torch.float32)

        new = method.refresh(context_of(predict, pool=pool, unlabeled=unlabeled, labeled=labeled, labels=labels))
        assert new.labeled.tolist() == [0, 1, 2, 3, *(10 + s for s in slots)]
        assert new.labels.tolist() == [0, 0, 0, 1, *classes]
        labeled, labels = new.labeled, new.labels  # what the next generation is shown


@pytest.mark.parametrize(("steps", "generations"), [(60, 6), (13, 4), (12, 1)])
def test_generations_share_the_steps_and_restart_the_schedule(steps, generations):
    method = crest(steps=steps, generations=generations)
    generation = [step * generations // steps for step in range(steps)]
    due = [step for step in range(steps) if method.refresh_due(step)]
    assert due == [step for step in range(1, steps) if generation[step] != generation[step - 1]]
    assert len(due) == generations - 1
    position = [method.schedule(torch.tensor(step), steps) for step in range(steps)]
    assert all(length == steps for _, length in position)
    for step, (done, _) in enumerate(position):  # the share of its generation that a step has before it
        assert done.item() / steps == pytest.approx(step * generations / steps - generation[step])


def test_without_pda_the_predictions_are_the_targets():
    method, seen = crest(), rows()
    assert torch.equal(method(seen, torch.tensor(0), None).probabilities, seen.weak_logits.softmax(1))
    assert not list(method.state_dict())


def predict_anything(network, images):
    return None, torch.ones(len(images), K)


def test_pda_against_a_loop_over_two_generations():
    counts = [40, 20, 10, 5]
    method = crest(counts, steps=6, generations=3, t_min=0.5, momentum=0.9)
    method.bind(torch.nn.Module(), torch.nn.Module())
    average = None
    for step in range(6):
        if method.refresh_due(step):
            context = context_of(predict_anything, pool=torch.zeros(1), unlabeled=torch.tensor([0]))
            method.refresh(context)
            average = None
        seen = rows(step)
        predictions = [softmax(row) for row in seen.weak_logits.tolist()]
        mean = [sum(p[c] for p in predictions) / U for c in range(K)]
        average = mean if average is None else [0.9 * a + 0.1 * m for a, m in zip(average, mean)]
        exponent = 1 - 0.5 * (step // 2) / 2
        target = [(n / 75) ** exponent for n in counts]
        expected = []
        for p in predictions:
            aligned = [v * (q / sum(target) + 1e-6) / (a + 1e-6) for v, q, a in zip(p, target, average)]
            expected.append([v / sum(aligned) for v in aligned])
        targets = method(seen, torch.tensor(step), None)
        torch.testing.assert_close(targets.probabilities, torch.tensor(expected), rtol=1e-4, atol=1e-7)


def test_a_single_generation_aligns_with_the_labeled_frequencies():
    assert crest(generations=1, t_min=0.5)._exponent(torch.tensor(59)).item() == 1
