"""`losses.BaConLoss`: whole steps against a simulation of methods.md E.2 to E.6 in plain Python, float64."""

import copy
import math

import bacon_oracle
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bacon_fast import functional
from bacon_fast.losses import BaConLoss

LABELED, UNLABELED, CLASSES, FEATURES = 12, 20, 5, 9
B, U, STEPS = 6, 10, 12


def random_steps(num_steps=STEPS, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    true_class = torch.randint(CLASSES, (LABELED,), generator=g)
    for _ in range(num_steps):
        labeled_slots = torch.randint(LABELED, (B,), generator=g)
        yield {
            "features": torch.randn(B + U, FEATURES, generator=g, dtype=dtype),
            "labels": true_class[labeled_slots],
            # Of very different sizes: confident, unsure, and below 0.95 as a logit.
            "logits": torch.randn(B + U, CLASSES, generator=g, dtype=dtype)
            * torch.tensor([0.2, 3.0, 30.0])[torch.randint(3, (B + U, 1), generator=g)],
            "labeled_slots": labeled_slots,
            "unlabeled_slots": torch.randint(UNLABELED, (U,), generator=g),
        }


class Simulation:
    """methods.md E.2, step by step, with lists and dictionaries; ``official`` turns the oddities of its E.6 on."""

    def __init__(self, module, variant):
        self.module, self.official, self.blog = module, variant == "official", variant == "blog"
        self.batch_centers = module.centers == "batch"
        self.label, self.feature = {}, {}
        self.centers = {}

    def step(self, features, labels, logits, labeled_slots, unlabeled_slots, progress, active):
        z = self.module.projection(features).detach().double().requires_grad_()
        logits = logits.double()
        probability = logits.softmax(1).max(1).values
        predicted = logits.argmax(1)
        reliable = probability >= 0.98
        confident = logits.max(1).values >= 0.95 if self.official else probability >= 0.95
        slots = labeled_slots.tolist() + [LABELED + s for s in unlabeled_slots.tolist()]
        for r in range(B, B + U):
            if confident[r]:
                self.label[slots[r]] = int(predicted[r])
        if not self.official or confident[B:].any():
            for r in range(B):
                self.label[slots[r]] = int(labels[r])
        counts = [list(self.label.values()).count(c) for c in range(CLASSES)]

        used = self.centers
        if self.batch_centers:
            classes = labels.tolist() + predicted[B:].tolist()
            rows = {c: [r for r in range(B + U) if classes[r] == c and reliable[r]] for c in range(CLASSES)}
            used = {c: z[members].detach().mean(0) for c, members in rows.items() if members}
        centers, has_center = torch.zeros(CLASSES, z.shape[1], dtype=torch.float64), torch.zeros(CLASSES).bool()
        for c, center in used.items():
            centers[c], has_center[c] = center, True
        options = {"top_k": 3, "has_center": has_center}
        if self.blog:
            options |= {"temperature": 0.5, "bta": 1.0, "min_temperature": 0.1, "negative_weight": None}
            options |= {"neg_mode": "paper"}
        loss = bacon_oracle.bacon_loss(
            z, labels, logits[B:], centers, reliable, torch.tensor(counts), progress, **options
        )
        gradient = torch.autograd.grad(loss, z)[0] if active and loss.requires_grad else torch.zeros_like(z)

        for r in range(B + U):
            if reliable[r]:
                self.feature[slots[r]] = (z[r] / z[r].norm() if self.blog else z[r]).detach()
        self.centers = {}
        for c in range(CLASSES):
            members = [s for s, y in self.label.items() if y == c]
            if self.official:
                rows = [self.feature.get(s, torch.ones(z.shape[1], dtype=torch.float64)) for s in members]
            else:
                rows = [self.feature[s] for s in members if s in self.feature]
            if rows:
                self.centers[c] = torch.stack(rows).mean(0)
        return (loss.detach() if active else torch.tensor(0.0)), gradient, counts


@pytest.mark.parametrize(
    "variant, centers", [("fixed", "bank"), ("official", "bank"), ("blog", "bank"), ("fixed", "batch")]
)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_steps_against_the_simulation(variant, centers, backend):
    torch.manual_seed(0)
    options = {"proj_dim": 4, "variant": variant, "centers": centers, "backend": backend}
    module = BaConLoss(FEATURES, CLASSES, LABELED, UNLABELED, **options)
    simulation = Simulation(module, variant)
    positive = 0
    for t, step in enumerate(random_steps()):
        progress, active = t / STEPS, t >= 3
        module.projection.zero_grad()
        loss, stats = module(**step, progress=progress, active=active)
        expected_loss, expected_gradient, counts = simulation.step(**step, progress=progress, active=active)
        assert module.bank.class_counts.tolist() == counts
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5, abs=1e-7)
        assert stats["selected"].item() == pytest.approx(len(simulation.label) / (LABELED + UNLABELED))
        if active:
            loss.backward()
            # d loss / d projection, through the projection's bias and weight.
            torch.testing.assert_close(
                module.projection.bias.grad, expected_gradient.sum(0).float(), rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(
                module.projection.weight.grad,
                (expected_gradient.T @ step["features"].double()).float(),
                rtol=1e-4,
                atol=1e-5,
            )
            positive += loss.item() > 0
        for c in range(CLASSES):
            assert module.bank.has_center[c].item() == (c in simulation.centers)
            if c in simulation.centers:
                torch.testing.assert_close(module.bank.centers[c], simulation.centers[c].float(), rtol=1e-5, atol=1e-6)
    assert positive >= 6


def test_official_differs_from_fixed_by_its_three_flags():
    flags = {"count_gate": "logit", "labeled_counts": "with_pseudo", "center_slots": "selected"}

    def run(**options):
        torch.manual_seed(0)
        module = BaConLoss(FEATURES, CLASSES, LABELED, UNLABELED, proj_dim=4, **options)
        losses = torch.stack([module(**step, progress=0.5, active=True).loss for step in random_steps(seed=3)])
        return losses.detach(), module.state_dict()

    official, fixed = run(variant="official"), run()
    by_flags = run(**flags)
    assert torch.equal(official[0], by_flags[0])
    assert all(torch.equal(official[1][name], by_flags[1][name]) for name in official[1])
    # Each flag alone has its own effect.
    states = [run(**{name: value}) for name, value in flags.items() if name != "labeled_counts"]
    for losses, state in states:
        assert not torch.equal(losses, fixed[0])
        assert not torch.equal(state["bank.centers"], fixed[1]["bank.centers"])


def test_batch_centers_need_no_bank_and_have_no_gradient():
    """From the first step on, and equal to the loss with the centers given: autograd does not see them."""
    torch.manual_seed(0)
    step = next(random_steps())
    module = BaConLoss(FEATURES, CLASSES, LABELED, UNLABELED, centers="batch")
    loss = module(**step, progress=0.5, active=True).loss
    loss.backward()
    assert loss > 0 and BaConLoss(FEATURES, CLASSES, LABELED, UNLABELED)(**step, progress=0.5, active=True).loss == 0

    projected = module.projection(step["features"]).detach().requires_grad_()
    classes = torch.cat([step["labels"], step["logits"][B:].argmax(1)])
    reliable = step["logits"].softmax(1).amax(1) >= 0.98
    centers = torch.stack([projected[(classes == c) & reliable].mean(0) for c in range(CLASSES)]).detach()
    has_center = ~centers.isnan().any(1)
    assert not has_center.all(), "a class without a reliable row must be among them"
    expected = bacon_oracle.bacon_loss(
        projected, step["labels"], step["logits"][B:], centers, reliable, module.bank.class_counts, 0.5,
        has_center=has_center,
    )  # fmt: skip
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(module.projection.bias.grad, projected.grad.sum(0), rtol=1e-4, atol=1e-5)


def test_batch_centers_are_not_left_out_where_the_whole_step_is_fused():
    losses = []
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        module = BaConLoss(FEATURES, CLASSES, LABELED, UNLABELED, centers="batch", backend=backend)
        losses.append([module(**step, progress=0.5, active=True).loss.item() for step in random_steps(2)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[0][0] > 0


def test_top_k_of_one_turns_reliable_negative_selection_off():
    """methods.md E.4 without it: an unlabeled row is a negative of every class but its predicted one."""
    torch.manual_seed(0)
    module = BaConLoss(FEATURES, CLASSES, LABELED, UNLABELED, top_k=1)
    for step in random_steps(5):
        centers, has_center = module.bank.centers.clone(), module.bank.has_center.clone()
        loss = module(**step, progress=0.5, active=True).loss
    projected = module.projection(step["features"])
    reliable = step["logits"].softmax(1).amax(1) >= 0.98
    only_predicted = torch.nn.functional.one_hot(step["logits"].argmax(1), CLASSES).float()  # the top 1 and no more
    expected = bacon_oracle.bacon_loss(
        projected, step["labels"], only_predicted[B:], centers, reliable, module.bank.class_counts, 0.5, top_k=1,
        has_center=has_center,
    )  # fmt: skip
    assert loss > 0 and loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_labeled_counts_wait_for_a_pseudo_label():
    step = next(random_steps())
    step["logits"] = torch.zeros_like(step["logits"])
    for variant, expected in (("fixed", len(set(step["labeled_slots"].tolist()))), ("official", 0)):
        module = BaConLoss(FEATURES, CLASSES, LABELED, UNLABELED, variant=variant)
        module(**step, progress=0.0, active=False)
        assert module.bank.class_counts.sum() == expected
    step["logits"][B, 2] = 100.0
    module(**step, progress=0.0, active=False)
    assert module.bank.class_counts.sum() == len(set(step["labeled_slots"].tolist())) + 1


def test_before_its_start_the_projection_has_no_gradient():
    module = BaConLoss(FEATURES, CLASSES, LABELED, UNLABELED)
    features = torch.randn(B + U, FEATURES, requires_grad=True)
    step = next(random_steps()) | {"features": features}
    loss, stats = module(**step, progress=0.0, active=False)
    assert loss == 0 and not loss.requires_grad
    (loss + features.sum()).backward()
    assert all(parameter.grad is None for parameter in module.parameters())
    assert stats["bank_fill"] > 0 and module.bank.has_center.any()


def test_gradient_reaches_the_features_but_not_the_logits():
    module = BaConLoss(FEATURES, CLASSES, LABELED, UNLABELED)
    for step in random_steps(4):
        step["features"].requires_grad_(), step["logits"].requires_grad_()
        loss = module(**step, progress=0.5, active=True).loss
    loss.backward()
    assert step["features"].grad.abs().sum() > 0 and step["logits"].grad is None


@pytest.mark.parametrize("variant", ["fixed", "official"])
def test_state_dict_round_trip(variant):
    torch.manual_seed(0)
    steps = list(random_steps())
    first = BaConLoss(FEATURES, CLASSES, LABELED, UNLABELED, variant=variant)
    for step in steps[:6]:
        first(**step, progress=0.2, active=True)
    second = BaConLoss(FEATURES, CLASSES, LABELED, UNLABELED, variant=variant)
    second.load_state_dict(first.state_dict())
    for step in steps[6:]:
        losses = [module(**step, progress=0.4, active=True).loss for module in (first, second)]
        assert torch.equal(*losses)
    assert all(torch.equal(second.state_dict()[name], value) for name, value in first.state_dict().items())


def test_autocast_rounds_the_projection_only():
    torch.manual_seed(0)
    module = BaConLoss(FEATURES, CLASSES, LABELED, UNLABELED)
    for step in random_steps(5):
        centers, has_center = module.bank.centers.clone(), module.bank.has_center.clone()
        with torch.autocast("cpu", torch.bfloat16):
            step["logits"] = step["logits"].bfloat16()
            loss = module(**step, progress=0.5, active=True).loss
            projected = module.projection(step["features"])
    assert projected.dtype == torch.bfloat16 and loss.dtype == torch.float32
    logits = step["logits"].float()
    expected = functional.bacon_loss(
        projected,
        step["labels"],
        logits[B:],
        centers,
        logits.softmax(1).amax(1) >= 0.98,
        module.bank.class_counts,
        progress=0.5,
        has_center=has_center,
    )
    assert torch.equal(loss, expected) and loss > 0
    loss.backward()
    assert module.projection.weight.grad.dtype == torch.float32 and module.projection.weight.grad.any()


class NoSynchronization(TorchDispatchMode):
    """Fails on the operations that read a value back to the host or make a shape depend on one."""

    FORBIDDEN = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.masked_select", "aten.equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not str(func).startswith(self.FORBIDDEN), f"{func} synchronizes"
        if str(func).startswith(("aten.index.Tensor", "aten.index_put")):
            assert all(index is None or index.dtype == torch.int64 for index in args[1]), "index by a boolean mask"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"variant": "official"}, {"centers": "batch"}], ids=str)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_step_never_synchronizes_with_the_host(options, backend):
    module = BaConLoss(FEATURES, CLASSES, LABELED, UNLABELED, backend=backend, **options)
    for step in random_steps(2):
        with NoSynchronization():
            loss = module(**step, progress=torch.tensor(0.5), active=True).loss
            loss.backward()


def test_the_guard_against_synchronization_works():
    values = torch.ones(3)
    for offense in (lambda: values.sum().item(), lambda: values[values > 0], lambda: bool(values.any())):
        with pytest.raises(AssertionError), NoSynchronization():
            offense()


@pytest.mark.parametrize("options", [{}, {"backend": "reference"}, {"centers": "batch"}], ids=str)
def test_compiles_to_one_graph(options):
    torch.manual_seed(0)
    modules = [BaConLoss(FEATURES, CLASSES, LABELED, UNLABELED, **options) for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    compiled = torch.compile(modules[0], fullgraph=True, backend="aot_eager")
    for step in random_steps(4):
        losses = []
        for module in (compiled, modules[1]):
            features = step["features"].clone().requires_grad_()
            loss = module(**(step | {"features": features}), progress=torch.tensor(0.5), active=True).loss
            loss.backward()
            losses.append((loss.detach(), features.grad))
        torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-7)
    for name, buffer in modules[1].named_buffers():
        torch.testing.assert_close(modules[0].get_buffer(name), buffer, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("num_classes, expected", [(1, 1), (2, 1), (3, 2), (4, 3), (10, 3)])
def test_few_classes_lower_top_k(num_classes, expected):
    module = BaConLoss(FEATURES, num_classes, 4, 4)
    assert module.top_k == expected
    loss, _ = module(
        torch.randn(8, FEATURES),
        torch.zeros(4, dtype=torch.long),
        torch.randn(8, num_classes),
        torch.arange(4),
        torch.arange(4),
        progress=0.5,
        active=True,
    )
    assert loss.isfinite()


def test_projection_options():
    assert BaConLoss(FEATURES, CLASSES, 1, 1).bank.features.shape == (2, 32)
    assert isinstance(BaConLoss(FEATURES, CLASSES, 1, 1).projection, nn.Linear)
    without = BaConLoss(FEATURES, CLASSES, 1, 1, proj_layers=0)
    assert not list(without.parameters()) and without.bank.features.shape == (2, FEATURES)
    assert len(list(BaConLoss(FEATURES, CLASSES, 1, 1, proj_layers=2).parameters())) == 4


def test_temperatures():
    module = BaConLoss(FEATURES, 3, 4, 4, bta=0.5)
    assert module.temperatures(0.0).tolist() == pytest.approx([0.1] * 3)
    module.bank.class_counts.copy_(torch.tensor([8, 2, 0]))
    assert module.temperatures(0.5).tolist() == pytest.approx([0.1 * 0.875, 0.1 * 0.9375, 0.1])
    blog = BaConLoss(FEATURES, 3, 4, 4, variant="blog")
    blog.bank.class_counts.copy_(torch.tensor([8, 2, 0]))
    assert blog.temperatures(torch.tensor(0.0)).tolist() == pytest.approx([0.1, 0.25, 0.5])


@pytest.mark.parametrize(
    "option, message",
    [
        ({"variant": "paper"}, "variant: expected one of fixed, official, blog, found 'paper'"),
        ({"neg_mode": "mean"}, "neg_mode: expected one of authors, paper, found 'mean'"),
        ({"count_gate": "max"}, "count_gate: expected one of prob, logit, found 'max'"),
        ({"labeled_counts": "never"}, "labeled_counts: expected one of always, with_pseudo, found 'never'"),
        ({"center_slots": "all"}, "center_slots: expected one of written, selected, found 'all'"),
        ({"centers": "queue"}, "centers: expected one of bank, batch, found 'queue'"),
        ({"proj_layers": 5}, "num_layers: expected 0, 1 or 2, found 5"),
        ({"top_k": 0}, "top_k: expected a positive integer, found 0"),
        ({"temperature": 0.0}, "temperature: expected a number > 0, found 0"),
        ({"bta": 1.0}, "bta: expected a number below 1 where min_temperature is 0, found 1"),
        ({"bta": 50.0, "variant": "official"}, "bta: expected a number below 1 where min_temperature is 0, found 50"),
        ({"negative_weight": 0.0}, "negative_weight: expected a number > 0, found 0"),
        ({"reliable_threshold": math.nan}, "reliable_threshold: expected a number >= 0, found nan"),
        ({"count_threshold": math.nan}, "count_threshold: expected a number > -inf, found nan"),
        ({"reliable_threshold": "0.9"}, "reliable_threshold: expected a number, found str"),
        ({"num_labeled": -1}, "num_labeled: expected an integer >= 0, found -1"),
        ({"num_unlabeled": "9"}, "num_unlabeled: expected an integer >= 0, found '9'"),
        ({"num_classes": 0}, "num_classes: expected a positive integer, found 0"),
        ({"proj_dim": 2.5}, "proj_dim: expected a positive integer, found 2.5"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_options_are_named(option, message):
    sizes = {"num_classes": CLASSES, "num_labeled": LABELED, "num_unlabeled": UNLABELED}
    with pytest.raises((ValueError, TypeError), match=message):
        BaConLoss(FEATURES, **(sizes | option))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(
    ("name", "slot", "last"),
    [
        ("labeled_slots", LABELED, LABELED - 1),
        ("labeled_slots", -1, LABELED - 1),
        ("unlabeled_slots", -1, UNLABELED - 1),
        ("unlabeled_slots", UNLABELED, UNLABELED - 1),
    ],
)
def test_slots_of_one_set_are_never_those_of_the_other(name, slot, last, backend):
    module = BaConLoss(FEATURES, CLASSES, LABELED, UNLABELED, backend=backend)
    (step,) = random_steps(1)
    step[name] = step[name].clone()
    step[name][2] = slot
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=rf"{name}: expected values in 0\.\.{last}, found {slot}"):
        module(**step, progress=0.5, active=True)
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("found", [-2, CLASSES, 10**12])
def test_a_state_with_a_class_that_does_not_exist_is_refused(found):
    """On a GPU the kernels index by it, and nothing else looks at it."""
    module = BaConLoss(FEATURES, CLASSES, LABELED, UNLABELED)
    state = module.state_dict()
    state["bank.selected_label"] = state["bank.selected_label"].clone()
    module.load_state_dict(state)
    state["bank.selected_label"][3] = found
    with pytest.raises(ValueError, match=rf"selected_label: expected classes in -1\.\.{CLASSES - 1}, found {found}"):
        module.load_state_dict(state)
