"""CDMAD as a run builds it on either base: the losses of newer_methods.md L before and after its start, every empty
image, the alignment, and the authors' slip."""

import math
from dataclasses import replace

import pytest
import torch
from built_cases import COUNTS, SEED, SIDE, STEPS, answer, averaged_answer, build, cross_entropies, make_batch, one_hot
from torch import nn

from bacon_fast.methods.mixup import draw_quarter_turns

START = 4  # of 8 steps
# After normalization by the mean (.5, .4, .3) and the deviation (.2, .25, .5).
COLORS = {"ones": (1, 1, 1), "zeros": (0, 0, 0), "white": (2.5, 2.4, 1.4), "black": (-2.5, -1.6, -0.6)}
SHARED = {"threshold": 0.95, "distribution_momentum": 0.8}


def empty(image: str) -> torch.Tensor:
    return torch.tensor(COLORS[image], dtype=torch.float64)[None, :, None, None].expand(1, 3, SIDE, SIDE)


def debiased(method, weak: torch.Tensor, image: str, t: int) -> torch.Tensor:
    """q of weak logits in the step after t steps."""
    beta = answer(method.network, empty(image))[0].detach()
    return (weak.detach() - beta * (t >= START)).softmax(1)


def assert_losses(method, batch, t: int, expected: dict[str, torch.Tensor]) -> None:
    output = method(batch, torch.tensor(t), method.phase(t))
    for name, value in expected.items():
        assert output.losses[name].item() == pytest.approx(value.item(), rel=1e-6), (t, name)
    parameters = list(method.network.parameters())
    gradients = [torch.autograd.grad(loss, parameters) for loss in (output.total, sum(expected.values()))]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("image", COLORS)
@pytest.mark.parametrize("threshold", [0.0, 0.54])
def test_fixmatch_around_the_start(image, threshold):
    b, u = rows = 3, 6
    own = {"start": START / STEPS, "image": image, "threshold": threshold}
    method = build("fixmatch+cdmad", rows, shared=SHARED, fixmatch={"lambda_u": 0.5}, cdmad=own)
    masks = []
    for t in (START - 1, START):
        batch = make_batch(method, rows, seed=t)
        labeled, weak, *strong = answer(method.network, batch.images)[0].split([b, u, u, u])
        q = debiased(method, weak, image, t)
        mask = q.amax(1) >= threshold
        masks += mask.tolist()
        unlabeled = 0.5 * sum((mask * cross_entropies(v, q)).sum() for v in strong) / (2 * u)
        labeled = cross_entropies(labeled, one_hot(batch.labels)).mean()
        assert_losses(method, batch, t, {"supervised": labeled, "unsupervised": unlabeled})
        seen, average = batch.view(0), method.averaged
        expected = averaged_answer(average, seen) - averaged_answer(average, empty(image))
        torch.testing.assert_close(average.predict(seen)[1], expected.detach())
    assert any(masks) and all(masks) == (threshold == 0), "the case must have both kinds of rows"


@pytest.mark.parametrize("align", [False, True])
def test_remixmatch_around_the_start(align):
    b, _ = rows = 5, 5
    weights = {"lambda_u": 2.0, "lambda_kl": 0.5, "lambda_rot": 1.0}
    own = {"start": START / STEPS, "image": "white", "align": "on" if align else "off"}
    method, average = build("remixmatch+cdmad", rows, shared=SHARED, remixmatch=weights, cdmad=own), None
    frequency = COUNTS.double() / COUNTS.sum()
    for t in (START - 1, START):
        batch, step = make_batch(method, rows, seed=t), torch.tensor(t)
        _, strong, _, weak = batch.images.split(b)
        q = debiased(method, answer(method.network, weak)[0], "white", t)
        if align:
            average = q.mean(0) if average is None else 0.8 * average + 0.2 * q.mean(0)
            q = q * (frequency + 1e-6) / (average + 1e-6)
            q = q / q.sum(1, keepdim=True)

        keep, other = method.mixup.draw(4 * b, step)
        images, targets = (
            keep * values + (1 - keep) * values[other]
            for values in (batch.images, torch.cat([one_hot(batch.labels), q, q, q]))
        )
        mixed = cross_entropies(torch.cat([answer(method.network, block)[0] for block in images.split(b)]), targets)
        turns = draw_quarter_turns(b, SEED, step)
        turned = torch.stack([image.rot90(k, (1, 2)) for image, k in zip(strong, turns.tolist())])
        rotation = answer(method.network, turned, method.rotation_head)[0]
        ramp = t / STEPS
        expected = {
            "supervised": mixed[:b].mean(),
            "unsupervised": 2.0 * ramp * mixed[b:].mean(),
            "unmixed": 0.5 * ramp * cross_entropies(answer(method.network, strong)[0], q).mean(),
            "rotation": cross_entropies(rotation, one_hot(turns, 4)).mean(),
        }
        assert_losses(method, batch, t, expected)


@pytest.mark.parametrize("t", [0, STEPS - 1])
@pytest.mark.parametrize(("base", "passes", "rows"), [("fixmatch", 4, (3, 6)), ("remixmatch", 11, (5, 5))])
def test_the_authors_slip_lets_the_image_move_the_running_statistics_as_one_of_their_passes(base, passes, rows, t):
    """Theirs move them by 0.1 each, that of the image first; ours once, by 1 - 0.9^passes."""
    found = []
    for slip in (False, True):
        own = {"authors_statistics": slip, "image": "black"}
        method = build(f"{base}+cdmad", rows, shared=SHARED, momentum=1 - 0.9**passes, cdmad=own)
        bn = method.network.backbone.bn
        before = torch.stack([bn.running_mean, bn.running_var])
        method(make_batch(method, rows, seed=1), torch.tensor(t), method.phase(t))
        found.append(torch.stack([bn.running_mean, bn.running_var]))
    of_image = torch.stack(answer(method.network, empty("black"))[1]).detach()
    torch.testing.assert_close(found[1] - found[0], 0.9**passes * 0.1 * (of_image - before))


# --- the documented alignment ----------------------------------------------------------------------------------------


class Mean(nn.Module):
    """The colors of images."""

    num_features = 3

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


BETA = torch.tensor([1.5, 0, -0.5], dtype=torch.float64)
WEAK = torch.tensor([[2, 1, 0], [0.2, 0.1, 0.3]], dtype=torch.float64)
EARLY = [[0.66524096, 0.24472847, 0.09003057], [0.33222499, 0.30060961, 0.3671654]]
Q = [[0.27406862, 0.45186276, 0.27406862], [0.07563513, 0.30671557, 0.6176493]]
ALIGNED = [[0.6918532, 0.26292575, 0.04522105], [0.40510685, 0.37866379, 0.21622936]]


def of_logits(method, logits: torch.Tensor):
    """A batch, view by view, to which the network answers with these logits."""
    images = (logits - BETA)[:, :, None, None].expand(-1, 3, SIDE, SIDE)
    return replace(make_batch(method, (2, 2), seed=0), images=images)


@pytest.mark.parametrize(
    ("align", "t", "targets"), [(False, START - 1, EARLY), (False, START, Q), (True, START, ALIGNED)]
)
def test_remixmatch_trains_towards_the_documented_targets(align, t, targets):
    """CE(e_c, q) is log(e + 2) - q_c, and log 3 where all logits are 0: the loss of the first strong view says q."""
    own = {"start": START / STEPS, "image": "zeros", "align": "on" if align else "off"}
    for row, column in ((j, c) for j in range(2) for c in range(3)):
        head = nn.Linear(3, 3)
        head.weight.data, head.bias.data = torch.eye(3), BETA.float()
        method = build("remixmatch+cdmad", (2, 2), shared=SHARED, backbone=Mean(), head=head, cdmad=own)
        strong = torch.zeros(2, 3, dtype=torch.float64)
        strong[row, column] = 1
        logits = torch.cat([torch.zeros_like(WEAK), strong, torch.zeros_like(WEAK), WEAK])
        loss = method(of_logits(method, logits), torch.tensor(t), method.phase(t)).losses["unmixed"].item()
        found = math.log(math.e + 2) + math.log(3) - 2 * loss / (method.lambda_kl * t / STEPS)
        assert found == pytest.approx(targets[row][column], abs=1e-7), (row, column)
