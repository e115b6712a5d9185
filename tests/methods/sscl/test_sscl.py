"""SsCL's step and refresh against float64 loops written from methods.md F, on a small network."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from no_synchronization import NoSynchronization
from torch import nn

from bacon_fast.data.philox import Stream, philox
from bacon_fast.methods.method import RefreshContext
from bacon_fast.methods.outputs import Batch
from bacon_fast.methods.sscl.method import SsCL
from bacon_fast.models.heads import projection_head
from bacon_fast.models.network import Network

K, B, U, D, SIDE = 3, 3, 5, 4, 8
LABELS = torch.tensor([0, 1, 0, 0, 1, 0, 0])  # class 2 has no labeled image
N_ULB, QUEUE, SEED = 9, 7, 11


class Shift(nn.Module):
    """Stands in for the distortion: visible in the strong views, and aware of step and slot."""

    def forward(self, images, step, slots):
        return images + 0.1 * step + 0.01 * slots[:, None, None, None]


def build(**changes) -> SsCL:
    torch.manual_seed(0)
    network = Network("wrn-10-1", K, balanced_head=False, bn_momentum=0.05)
    nn.init.normal_(network.head.weight)  # confident here and there
    options = {
        "num_labeled": len(LABELS),
        "num_unlabeled": N_ULB,
        "threshold": 0.6,
        "lambda_u": 2.0,
        "lambda_con": 3.0,
        "soft": False,
        "momentum": 0.9,
        "queue_size": QUEUE,
        "extra_keys": 2,
        "gamma": 5.0,
        "margin": -0.25,
        "form": "prod",
        "mask_queue": False,
        "calibration": "ratio",
        "temperature": 0.1,
        "refresh_every": 4,
        "seed": SEED,
    }
    return SsCL(network, projection_head(64, D, 2), Shift(), **(options | changes))


def known_state(method: SsCL) -> None:
    """Puts values into every buffer that a step reads."""
    generator = torch.Generator().manual_seed(1)
    unit = lambda *shape: F.normalize(torch.randn(*shape, generator=generator), dim=-1)  # noqa: E731
    method.bank.fill_(unit(len(LABELS), D), LABELS)
    present = torch.tensor([True, True, False])
    assigned = torch.tensor([0, 1, 2, 0, 1, 0, 2, 1, 0])
    method.prototypes.set_(unit(K, 64).abs() * present[:, None], present, unit(N_ULB, 64).abs(), assigned)
    method.prototypes.alpha.copy_(torch.rand(N_ULB, generator=generator))
    method.queue.enqueue_(unit(4, D), torch.tensor([0, 1, 2, 0]))
    for parameter in method.key_encoder.parameters():  # no longer the query encoder
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def make_batch(seed: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        torch.randn(B + 2 * U, 3, SIDE, SIDE, generator=generator),
        LABELS[[4, 2, 0]],
        torch.tensor([4, 2, 0]),
        torch.tensor([8, 1, 2, 5, 6]),
        torch.tensor([0, 1, 2, -1, 0]),
    )


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def normalized(row):
    return row / row.norm()


def step_by_a_loop(method: SsCL, batch: Batch, step: int, options: dict):
    """Total loss, and the rows that enter queue and bank, from copies in float64; `method` is left alone."""
    network, projection = copy.deepcopy(method.network).double(), copy.deepcopy(method.projection).double()
    key_backbone = copy.deepcopy(method.key_encoder.backbone).double()
    key_projection = copy.deepcopy(method.key_encoder.projection).double()
    images = batch.images.double()
    strong = torch.stack([images[B + U + j] + 0.1 * step + 0.01 * j for j in range(U)])
    features = network.backbone(torch.cat([images[: B + U], strong]))
    logits = network.head(features)
    queries = [normalized(q) for q in projection(features[B + U :])]
    for key_part, part in ((key_backbone, network.backbone), (key_projection, projection)):
        for own, online in zip(key_part.parameters(), part.parameters()):
            own.data = 0.9 * own.data + 0.1 * online.data
    keys = [normalized(k).detach() for k in key_projection(key_backbone(images[: B + U]))]

    supervised = sum(-logits[b].log_softmax(0)[batch.labels[b]] for b in range(B)) / B

    prototypes = method.prototypes
    weak = features[B : B + U].detach()
    cosines = [
        [
            float(dot(normalized(weak[j]), prototypes.vectors[c].double())) if prototypes.present[c] else -1.0
            for c in range(K)
        ]
        for j in range(U)
    ]
    pi = [torch.tensor(row, dtype=torch.float64).div(0.1).softmax(0) for row in cosines]
    history = method.calibration.history.double().clone()
    history[int(method.calibration.position)] = sum(pi) / U
    unsupervised, confident = 0.0, []
    for j in range(U):
        p = logits[B + j].detach().softmax(0) * pi[j] / (history.mean(0) + 1e-6)
        p = p / p.sum()
        confident.append(bool(p.max() >= method.threshold))
        target = p if options["soft"] else F.one_hot(p.argmax(), K).double()
        unsupervised += confident[-1] * -(target * logits[B + U + j].log_softmax(0)).sum() / U

    contrastive, gamma, margin = 0.0, options["gamma"], options["margin"]
    words = philox(SEED, step, Stream.SSCL_KEYS, torch.arange(U), max(options["extra_keys"], 1)).tolist()
    for j, slot in enumerate(batch.unlabeled_slots.tolist()):
        c, alpha = int(prototypes.assigned[slot]), float(prototypes.alpha[slot])
        members = [i for i in range(len(LABELS)) if LABELS[i] == c]
        # Floyd: draw i takes one of the first top + 1 members, or the last of these if it is taken.
        picks = []
        for i in range(min(options["extra_keys"], len(members))):
            top = max(len(members) - options["extra_keys"], 0) + i
            pick = words[j][i] * (top + 1) >> 32
            picks.append(top if pick in picks else pick)
        positives = [(1.0, keys[B + j])] + [(alpha, method.bank.keys[members[i]].double()) for i in picks]
        negatives = [
            key.double()
            for key, other in zip(method.queue.keys, method.queue.classes.tolist())
            if not (options["mask_queue"] and other == c)
        ]
        n = sum(torch.exp(gamma * (dot(queries[j], k) + margin)) for k in negatives)
        if options["form"] == "prod":
            loss = torch.log(1 + n * sum(torch.exp(-gamma * a * dot(queries[j], k)) for a, k in positives))
        else:
            loss = torch.log(1 + n / sum(torch.exp(gamma * a * dot(queries[j], k)) for a, k in positives))
        contrastive += loss / U
    terms = {"supervised": supervised, "unsupervised": 2.0 * unsupervised, "contrastive": 3.0 * contrastive}
    return terms, network, projection, keys, confident


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"form": "sum", "soft": True},
        {"extra_keys": 0},
        {"extra_keys": 6, "margin": 0.1, "mask_queue": True},
        {"backend": "reference"},
    ],
    ids=["default", "sum-soft", "no-extra-keys", "more-keys-than-there-are", "reference"],
)
def test_the_whole_step_against_a_loop(changes):
    method = build(**changes)
    known_state(method)
    options = {
        "soft": False,
        "gamma": 5.0,
        "margin": -0.25,
        "form": "prod",
        "extra_keys": 2,
        "mask_queue": False,
    } | changes
    batch, step = make_batch(), 6
    terms, network, projection, keys, confident = step_by_a_loop(method, batch, step, options)
    assert 0 < sum(confident) < U, "the case must have both kinds of rows"
    queue, bank = method.queue.keys.clone(), method.bank.keys.clone()

    output = method(batch, torch.tensor(step), None)
    for name, expected in terms.items():
        assert output.losses[name].item() == pytest.approx(expected.item(), rel=2e-5), name
    assert output.losses["total"].item() == pytest.approx(sum(t.item() for t in terms.values()), rel=2e-5)

    # The gradient, after the state was overwritten, is that of the loss before.
    output.total.backward()
    sum(terms.values()).backward()
    for own, other in ((method.network, network), (method.projection, projection)):
        for (name, parameter), expected in zip(own.named_parameters(), other.parameters()):
            torch.testing.assert_close(parameter.grad, expected.grad.float(), rtol=2e-3, atol=2e-5, msg=name)

    # Queue: four entries were there, so the step's five keys fill three places and begin again.
    for j in range(U):
        queue[(4 + j) % QUEUE] = keys[B + j].float()
    torch.testing.assert_close(method.queue.keys, queue, rtol=1e-4, atol=1e-5)
    entered = [int(method.prototypes.assigned[slot]) for slot in batch.unlabeled_slots]
    assert method.queue.classes.tolist() == [*entered[3:], 2, 0, *entered[:3]]
    for b, slot in enumerate(batch.labeled_slots.tolist()):
        bank[slot] = keys[b].float()
    torch.testing.assert_close(method.bank.keys, bank, rtol=1e-4, atol=1e-5)
    assert [p >= 0 for p in output.pseudo_labels.tolist()] == confident


def test_without_extra_keys_and_margin_it_is_moco():
    """MoCo's own formulation: cross entropy over [own key | queue] with the own key as class 0."""
    method = build(extra_keys=0, margin=0.0, lambda_con=1.0)
    known_state(method)
    batch = make_batch()
    network, key_encoder = copy.deepcopy(method.network), copy.deepcopy(method.key_encoder)
    images = torch.cat([batch.images[: B + U], Shift()(batch.view(1), torch.tensor(0), torch.arange(U))])
    queries = F.normalize(method.projection(network.backbone(images)[B + U :]), dim=1)
    key_encoder.update(method.network.backbone, method.projection)
    keys = key_encoder(batch.images[: B + U])[B:]
    logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ method.queue.keys.T], dim=1) * 5.0
    expected = F.cross_entropy(logits, torch.zeros(U, dtype=torch.int64))
    assert method(batch, torch.tensor(0), None).losses["contrastive"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_step_is_static():
    method = build(mask_queue=True, backend="reference")
    known_state(method)
    addresses = {name: value.data_ptr() for name, value in method.state_dict().items()}
    with NoSynchronization():
        method(make_batch(), torch.tensor(0), None).total.backward()
    assert {name: value.data_ptr() for name, value in method.state_dict().items()} == addresses


@pytest.mark.slow
@pytest.mark.parametrize("soft", [False, True])
def test_compiled_gradients_and_state_are_those_of_the_eager_step(soft):
    """Backward must see the queue and the labeled keys of before the step, and with soft targets the calibration's
    history of after its update, whatever the compiler recomputes."""
    runs = []
    for compiled in (False, True):
        method = build(mask_queue=True, soft=soft)
        known_state(method)
        call = torch.compile(method, backend="aot_eager_decomp_partition") if compiled else method
        records = []
        for step in range(3):
            method.zero_grad()
            output = call(make_batch(step), torch.tensor(step), None)
            output.total.backward()
            # The stem's bias is left out: BatchNorm subtracts it, so its gradient is rounding.
            gradients = {
                n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None and "stem" not in n
            }
            records.append((output.total.detach(), gradients))
        runs.append((records, method.state_dict()))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-3, atol=1e-5)


def test_under_several_ranks_keys_are_encoded_in_a_drawn_order_and_come_back(monkeypatch):
    """MoCo's shuffled BatchNorm; here the rows of all ranks stay in one process."""
    method, seen = build(), []
    images = torch.randn(B + U, 3, SIDE, SIDE).to(memory_format=torch.channels_last)
    expected = method.key_encoder(images)
    encode = method.key_encoder.forward
    monkeypatch.setattr(method.key_encoder, "forward", lambda rows: seen.append(rows) or encode(rows))
    monkeypatch.setattr("bacon_fast.methods.sscl.method.num_ranks", lambda: 2)
    monkeypatch.setattr("bacon_fast.methods.sscl.method.gather_views", lambda rows, *sizes: rows.contiguous())
    monkeypatch.setattr("bacon_fast.methods.sscl.method.own_views", lambda rows, *sizes: rows)
    orders = set()
    for step in range(3):
        found = method._encode(images, (B, U), torch.tensor(step))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # of one batch, in whatever order
        rows = seen.pop()
        assert rows.is_contiguous(memory_format=torch.channels_last)
        orders.add(tuple(next(i for i in range(B + U) if torch.equal(row, images[i])) for row in rows))
    assert all(sorted(order) == list(range(B + U)) for order in orders)
    assert len(orders) == 3 and tuple(range(B + U)) not in orders


def test_only_queries_and_classifier_are_trained():
    method = build()
    known_state(method)
    method(make_batch(), torch.tensor(0), None).total.backward()
    trained = {name.split(".")[0] for name, p in method.named_parameters() if p.requires_grad}
    assert trained == {"network", "projection"}
    assert all((p.grad is not None) == p.requires_grad for p in method.parameters())


# --- refresh ----------------------------------------------------------------------------------------------------------


def make_context(step: int, labels: torch.Tensor = LABELS) -> RefreshContext:
    generator = torch.Generator().manual_seed(3)
    pool = torch.randint(0, 256, (20, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
    order = torch.randperm(20, generator=generator)

    def normalize(images):
        return images.permute(0, 3, 1, 2).float() / 128 - 1

    @torch.inference_mode()
    def predict(network, images):
        training = network.training
        network.eval()
        result = network.predict(normalize(images))
        network.train(training)
        return result

    return RefreshContext(step, pool, order[: len(LABELS)], order[-N_ULB:], labels, normalize, predict)


def raw_features(network: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """Of one uint8 image, float64."""
    return network.backbone((image.double() / 128 - 1).permute(2, 0, 1)[None])[0].detach()


def unit_features(network: nn.Module, image: torch.Tensor) -> torch.Tensor:
    return normalized(raw_features(network, image))


@pytest.mark.parametrize("raw", [False, True], ids=["unit", "raw"])
@pytest.mark.parametrize("labels", [LABELS, torch.full_like(LABELS, 1)], ids=["two-classes", "one-class"])
def test_refresh_against_a_loop(labels, raw):
    """`raw`: the paper's sentences, features averaged as they are and alpha of the nearest prototype."""
    method = build(**({"unit_features": False, "alpha_of": "nearest"} if raw else {}))
    context, step = make_context(8, labels), 8
    method.network(torch.randn(30, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(4)))  # BatchNorm's statistics
    method.refresh(context)
    network = copy.deepcopy(method.network).double().eval()
    labeled = [context.pool[i] for i in context.labeled.tolist()]
    unlabeled = [context.pool[i] for i in context.unlabeled.tolist()]
    averaged = raw_features if raw else unit_features
    v = [averaged(network, image) for image in labeled]
    u = [unit_features(network, image) for image in unlabeled]
    assigned = []
    for image in unlabeled:
        features = network.backbone((image.double() / 128 - 1).permute(2, 0, 1)[None])
        assigned.append(int(network.head(features)[0].argmax()))
    assert method.prototypes.assigned.tolist() == assigned and len(set(assigned)) > 1

    members = {c: [i for i in range(len(labels)) if labels[i] == c] for c in range(K)}
    words = philox(SEED, step, Stream.SSCL_MIXTURE, torch.arange(len(labels)), 3).tolist()
    refined = {c: [v[i] for i in members[c]] for c in range(K)}
    for i, c in enumerate(labels.tolist()):
        mean = normalized(sum(v[k] for k in members[c]))
        near = sorted((j for j in range(N_ULB) if assigned[j] == c), key=lambda j: -float(u[j] @ mean))
        near = near[: len(members[c])]
        if near:
            a, b, w = words[i]
            x, partner = labeled[members[c][a * len(members[c]) >> 32]], unlabeled[near[b * len(near) >> 32]]
            weight = (w >> 8) / 2**24
            mixed = (weight * x.double() + (1 - weight) * partner.double()).round()
            refined[c].append(averaged(network, mixed))
    mixtures = {c: len(refined[c]) - len(members[c]) for c in range(K)}
    assert any(mixtures.values()), "the case must have mixtures"
    for c in range(K):
        assert bool(method.prototypes.present[c]) == bool(members[c])
        expected = normalized(sum(refined[c])) if members[c] else torch.zeros(64, dtype=torch.float64)
        torch.testing.assert_close(method.prototypes.vectors[c].double(), expected, rtol=0, atol=1e-5)
    for j, c in enumerate(assigned):
        of = [k for k in range(K) if members[k]] if raw else [c] if members[c] else []
        expected = max([0.0, *(float(u[j] @ normalized(sum(refined[k]))) for k in of)])
        assert method.prototypes.alpha[j].item() == pytest.approx(expected, abs=1e-5)

    # Labeled keys: the key encoder's, in evaluation mode; drawn from by class.
    encoder = copy.deepcopy(method.key_encoder).double().eval()
    for slot, image in enumerate(labeled):
        pixels = (image.double() / 128 - 1).permute(2, 0, 1)[None]
        key = normalized(encoder.projection(encoder.backbone(pixels))[0])
        torch.testing.assert_close(method.bank.keys[slot].double(), key, rtol=0, atol=1e-5)
    assert method.bank.count.tolist() == [len(members[c]) for c in range(K)]
    assert method.network.training and method.key_encoder.training


def test_refresh_is_due_before_the_first_step_and_then_regularly():
    method = build(refresh_every=4)
    assert [step for step in range(13) if method.refresh_due(step)] == [0, 4, 8, 12]


def test_refresh_of_more_images_than_one_chunk(monkeypatch):
    whole, parts = build(), build()
    whole.refresh(make_context(0))
    monkeypatch.setattr("bacon_fast.methods.method.CHUNK", 4)
    monkeypatch.setattr("bacon_fast.methods.sscl.refresh.MIXED_CHUNK", 3)
    parts.refresh(make_context(0))
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values()):
        torch.testing.assert_close(a, b, msg=name)


def test_a_class_without_labels_has_only_its_own_keys_and_no_part_in_similarities():
    method = build()
    method.refresh(make_context(0))
    assert not method.prototypes.present[2] and (method.prototypes.similarity(torch.randn(4, 64))[:, 2] == -1).all()
    assert not method.bank.draw(torch.tensor([2, 2]), 3, SEED, 0)[1].any()
    assert math.isfinite(method(make_batch(), torch.tensor(0), None).total.item())
