"""SAW's weights, their refresh and what they weigh, against loops written from methods.md H."""

import pytest
import torch
from balancer_cases import B, K, U, batch, cross_entropy, random_labels, rows, softmax
from refresh_cases import context_of

from bacon_fast.methods.balancers.saw import SAW, effective_number_weights
from bacon_fast.methods.fixmatch import FixMatch
from bacon_fast.methods.outputs import Outputs

STEP = torch.tensor(0)


def weights_by_loop(counts: list[int]) -> list[float]:
    mean = sum(counts) / len(counts)
    beta = (mean - 1) / mean
    weights = [(1 - beta) / (1 - beta**n) for n in counts]
    return [w * len(counts) / sum(weights) for w in weights]


@pytest.mark.parametrize("counts", [[100, 40, 20, 5], [1000, 10], [7], [1, 1, 1], [3, 3]])
def test_weights_against_a_loop(counts):
    weights = effective_number_weights(torch.tensor(counts))
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx(weights_by_loop(counts), rel=1e-6)
    assert weights.sum().item() == pytest.approx(len(counts))


def test_rare_classes_weigh_more_and_an_empty_one_as_if_it_had_one():
    weights = effective_number_weights(torch.tensor([50, 10, 1, 0]))
    assert weights[0] < weights[1] < weights[2] == weights[3]


def test_losses_with_the_weights_against_a_loop():
    counts = [40, 20, 10, 5]
    saw = SAW(torch.tensor(counts), steps=100, epochs=10)
    saw.unlabeled_weights.copy_(torch.tensor(weights_by_loop([9, 1, 5, 4])))
    seen, labels = rows(1), random_labels()
    labeled, strong = rows(2).weak_logits[:B], rows(3).weak_logits
    out = Outputs(torch.zeros(B + 2 * U, 1), torch.cat([labeled, seen.weak_logits, strong]), None, B, U)
    losses, *_ = FixMatch(threshold=0.8, lambda_u=1.0)(out, batch(labels), STEP, saw(seen, STEP, None))
    by_label, by_guess = weights_by_loop(counts), weights_by_loop([9, 1, 5, 4])
    supervised = sum(by_label[y] * cross_entropy(row, y) for row, y in zip(labeled.tolist(), labels.tolist())) / B
    unsupervised = 0.0
    for weak, row in zip(seen.weak_logits.tolist(), strong.tolist()):
        p = softmax(weak)
        if max(p) >= 0.8:
            guess = p.index(max(p))
            unsupervised += by_guess[guess] * cross_entropy(row, guess) / U
    assert unsupervised > 0
    assert losses["supervised"].item() == pytest.approx(supervised, rel=1e-5)
    assert losses["unsupervised"].item() == pytest.approx(unsupervised, rel=1e-5)


@pytest.mark.parametrize("chunk", [3, 4, 8, 4096])
def test_refresh_counts_the_averaged_networks_predictions_on_all_unlabeled_images(chunk, monkeypatch):
    monkeypatch.setattr("bacon_fast.methods.method.CHUNK", chunk)
    saw = SAW(torch.tensor([9, 3, 2, 1]), steps=100, epochs=10)
    network, averaged = torch.nn.Module(), torch.nn.Module()
    saw.bind(network, averaged)
    assert torch.equal(saw.unlabeled_weights, torch.ones(K)), "the first epoch is uniform"
    predicted = torch.tensor([0, 0, 0, 0, 0, 2, 2, 1])  # class 3 never: it counts as 1

    def predict(asked, images):
        assert asked is averaged and len(images) <= chunk
        seen.extend(images.tolist())
        return torch.zeros(len(images), 1), torch.nn.functional.one_hot(predicted[images - 10], K).float()

    seen = []
    assert saw.refresh(context_of(predict, pool=torch.arange(30), unlabeled=torch.arange(10, 18))) is None
    assert seen == list(range(10, 18))
    assert saw.unlabeled_weights.tolist() == pytest.approx(weights_by_loop([5, 1, 2, 1]), rel=1e-6)
    assert list(saw.state_dict()) == ["unlabeled_weights"]


@pytest.mark.parametrize(("steps", "epochs"), [(100, 10), (1500, 100), (10, 3), (5, 20)])
def test_refresh_is_due_when_an_epoch_begins_but_the_first(steps, epochs):
    saw = SAW(torch.tensor([2, 1]), steps=steps, epochs=epochs)
    epoch = [step * epochs // steps for step in range(steps)]
    due = [step > 0 and epoch[step] != epoch[step - 1] for step in range(steps)]
    assert [saw.refresh_due(step) for step in range(steps)] == due
    assert sum(due) == min(steps, epochs) - 1
