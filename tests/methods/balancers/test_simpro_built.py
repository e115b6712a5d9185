"""SimPro as a run builds it: the losses of newer_methods.md K, with options unlike the defaults."""

import pytest
import torch
from built_cases import COUNTS, K, answer, build, cross_entropies, make_batch, one_hot

B, U = ROWS = 3, 6
TAU, MOMENTUM, THRESHOLD, LAMBDA_U = 1.5, 0.7, 0.6, 0.5
S = (50 // U) / (10 // B)
EVERY = 2
ESTIMATES = 4  # in 8 steps


@pytest.mark.parametrize(("views", "labeled_strong"), [(2, True), (1, False)])
def test_the_options_are_those_of_the_formulas(views, labeled_strong):
    own = {"tau": TAU, "momentum": MOMENTUM, "threshold": THRESHOLD, "estimates": ESTIMATES}
    own |= {"strong_views": views, "labeled_strong": labeled_strong}
    method = build("fixmatch+simpro", ROWS, shared={}, fixmatch={"lambda_u": LAMBDA_U}, simpro=own)
    assert method.unlabeled_views == ("weak", *["strong"] * views) and method.labeled_strong_view == labeled_strong
    unlabeled_prior, prior = torch.full((K,), 1 / K).double(), COUNTS.double() / COUNTS.sum()
    unlabeled_sums, labeled_sums = torch.zeros(2, K).double()
    parameters, masks = list(method.network.parameters()), []
    for t in range(5):
        batch = make_batch(method, ROWS, seed=t)
        images = torch.cat([batch.images, batch.labeled_strong_images]) if labeled_strong else batch.images
        labeled, weak, *strong = answer(method.network, images)[0].split([B, U, *[U] * views, *[B] * labeled_strong])
        labeled, strong = torch.cat([labeled, *strong[views:]]), strong[:views]
        q = (weak.detach() + (unlabeled_prior**TAU + 1e-12).log()).softmax(1)
        mask, bias = q.amax(1) >= THRESHOLD, (prior**TAU + 1e-12).log()
        labels = one_hot(batch.labels).repeat(1 + labeled_strong, 1)
        expected = {
            "supervised": cross_entropies(labeled + bias, labels).mean() / S,
            "unsupervised": LAMBDA_U * sum((mask * cross_entropies(v + bias, q)).sum() for v in strong) / (views * U),
        }
        output = method(batch, torch.tensor(t), method.phase(t))
        assert output.losses.keys() == {"total", *expected}
        for name, value in expected.items():
            assert output.losses[name].item() == pytest.approx(value.item(), rel=1e-6), (t, name)
        gradients = [torch.autograd.grad(loss, parameters) for loss in (output.total, sum(expected.values()))]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)

        masks += mask.tolist()
        unlabeled_sums = unlabeled_sums + q[mask].sum(0)
        labeled_sums = labeled_sums + batch.labels.bincount(minlength=K)
        if (t + 1) % EVERY == 0:
            estimate, total = unlabeled_sums / (unlabeled_sums.sum() + 1), unlabeled_sums + labeled_sums
            unlabeled_prior = MOMENTUM * unlabeled_prior + (1 - MOMENTUM) * estimate
            prior = MOMENTUM * prior + (1 - MOMENTUM) * total / total.sum()
            unlabeled_sums, labeled_sums = torch.zeros(2, K).double()
    assert any(masks) and not all(masks), "the case must have both kinds of rows"
