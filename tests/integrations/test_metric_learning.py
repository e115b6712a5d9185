"""The drop-in losses against pytorch-metric-learning 2.9 itself: values, gradients, reducers, memory."""

import pytest
import torch
from pytorch_metric_learning import losses as pml
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance
from pytorch_metric_learning.miners import MultiSimilarityMiner
from pytorch_metric_learning.reducers import AvgNonZeroReducer, DoNothingReducer, MeanReducer, ThresholdReducer
from pytorch_metric_learning.regularizers import LpRegularizer
from torch.utils._python_dispatch import TorchDispatchMode

from bacon_fast.integrations import metric_learning as ours

NAMES = ["SupConLoss", "NTXentLoss"]
PAIRS = [(name, options) for name in NAMES for options in ({}, {"temperature": 0.5})]
LABELS = {
    "classes": [0, 1, 2, 0, 1, 2, 0, 0, 3, 1, 2, 2],
    "rows without positives": [0, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9],
    "one class": [4] * 12,
    "no positive": list(range(12)),
    "two views": [*range(6), *range(6)],
    "any integers": [-7, 2**40, 5, 5, -7, 2**40, 0, 0, 5, 0, -7, 9],
    "one pair": [1, 1, *range(2, 12)],
}


def embeddings_of(count, dtype=torch.float64, seed=0, dim=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def both(name, embeddings, labels, options, **call):
    """Value and gradients of the parent's loss and of ours, for every argument that has a gradient."""
    results = []
    for module in (pml, ours):
        inputs = [embeddings] + ([call["ref_emb"]] if "ref_emb" in call else [])
        inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        if "ref_emb" in call:
            call = {**call, "ref_emb": inputs[1]}
        loss = getattr(module, name)(**options)(inputs[0], labels, **call)
        wanted = [x for x in inputs if x.requires_grad]
        # The original's zero loss does not know the references: no gradient there, instead of zeros.
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        results.append([loss, *(torch.zeros_like(x) if g is None else g for x, g in zip(wanted, gradients))])
    return results


def assert_equal(results, **tolerance):
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("case", LABELS)
@pytest.mark.parametrize(("name", "options"), PAIRS)
def test_equals_the_original(name, options, case):
    labels = torch.tensor(LABELS[case])
    results = both(name, embeddings_of(12), labels, options)
    assert_equal(results, rtol=1e-9, atol=1e-12)
    assert (float(results[0][0]) > 0) == (case not in ("one class", "no positive"))


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("case", LABELS)
@pytest.mark.parametrize(("name", "options"), PAIRS)
def test_equals_the_original_with_references(name, options, case, learned):
    ref_emb = embeddings_of(31, seed=1).detach().requires_grad_(learned)
    ref_labels = torch.tensor(LABELS[case]).repeat(3)[3:34]
    results = both(name, embeddings_of(12), torch.tensor(LABELS[case]), options, ref_emb=ref_emb, ref_labels=ref_labels)
    assert_equal(results, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("labels", "ref_labels", "zero"),
    [([0], [0, 1], True), ([0], [0, 0, 1], False), ([0], [0, 1, 1], False), ([0], [0, 0], True), ([0], [1, 1], True)],
)
def test_a_single_pair_of_each_kind_is_a_zero_as_in_the_original(name, labels, ref_labels, zero):
    ref_emb = embeddings_of(len(ref_labels), seed=1)
    results = both(
        name, embeddings_of(1), torch.tensor(labels), {}, ref_emb=ref_emb, ref_labels=torch.tensor(ref_labels)
    )
    assert (float(results[0][0]) == 0) == zero
    assert float(results[1][0]) == pytest.approx(float(results[0][0]), rel=1e-9)
    assert zero or torch.allclose(results[0][1], results[1][1], rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_labels_object_leaves_out_the_diagonal_and_a_copy_does_not(name):
    labels, ref_emb = torch.tensor(LABELS["classes"]), embeddings_of(12, seed=1)
    same = both(name, embeddings_of(12), labels, {}, ref_emb=ref_emb, ref_labels=labels)
    copy = both(name, embeddings_of(12), labels, {}, ref_emb=ref_emb, ref_labels=labels.clone())
    assert_equal(same, rtol=1e-9, atol=1e-12)
    assert_equal(copy, rtol=1e-9, atol=1e-12)
    assert float(same[0][0]) != pytest.approx(float(copy[0][0]), rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_as_close_to_float64_as_the_original(name):
    labels = torch.randint(0, 20, (96,), generator=torch.Generator().manual_seed(0))
    exact, _ = both(name, embeddings_of(96, dim=48), labels, {})
    original, found = both(name, embeddings_of(96, torch.float32, dim=48), labels, {})
    for truth, theirs, mine in zip(exact, original, found):
        assert mine.dtype == torch.float32
        error, allowed = (mine - truth).abs().max(), (theirs - truth).abs().max()
        assert error <= 2 * allowed + 1e-6 * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_computed_in_float32(name, dtype):
    labels = torch.tensor(LABELS["classes"])
    embeddings = embeddings_of(12, dtype)
    _, found = both(name, embeddings, labels, {})
    exact, _ = both(name, embeddings.double(), labels, {})
    assert found[0].dtype == torch.float32 and found[1].dtype == dtype
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1].double(), exact[1], rtol=0.02, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"reducer": MeanReducer()},
        {"reducer": AvgNonZeroReducer()},
        {"reducer": ThresholdReducer(low=0.5, high=3.0)},
        {"reducer": AvgNonZeroReducer(collect_stats=True)},
        {"embedding_regularizer": LpRegularizer(), "embedding_reg_weight": 0.3},
        {"distance": DotProductSimilarity(normalize_embeddings=False)},
        {"distance": CosineSimilarity(power=2)},
        {"distance": LpDistance()},
        {"collect_stats": True},
    ],
    ids=lambda options: "-".join(f"{k}={type(v).__name__}" for k, v in options.items()),
)
@pytest.mark.parametrize("name", NAMES)
def test_options_of_the_original_keep_their_meaning(name, options):
    assert_equal(both(name, embeddings_of(12), torch.tensor(LABELS["classes"]), options), rtol=1e-9, atol=1e-12)


def test_unreduced_losses_are_those_of_the_original():
    labels = torch.tensor(LABELS["rows without positives"])
    found = [module.SupConLoss(reducer=DoNothingReducer())(embeddings_of(12), labels)["loss"] for module in (pml, ours)]
    torch.testing.assert_close(found[1]["losses"], found[0]["losses"])
    assert found[1]["reduction_type"] == "element" and torch.equal(found[0]["indices"], found[1]["indices"])
    pairs = ours.NTXentLoss(reducer=DoNothingReducer())(embeddings_of(12), labels)["loss"]
    assert pairs["reduction_type"] == "pos_pair" and len(pairs["losses"]) == 4


@pytest.mark.parametrize("name", NAMES)
def test_miners_and_index_tuples_go_to_the_original(name):
    embeddings, labels = embeddings_of(12), torch.tensor(LABELS["classes"])
    mined = MultiSimilarityMiner()(embeddings, labels)
    assert_equal(both(name, embeddings, labels, {}, indices_tuple=mined), rtol=1e-12, atol=0)
    assert_equal(both(name, embeddings, None, {}, indices_tuple=mined), rtol=1e-12, atol=0)
    with pytest.raises(ValueError):
        getattr(ours, name)()(embeddings)
    with pytest.raises(ValueError, match="Number of embeddings"):
        getattr(ours, name)()(embeddings, labels[:3])


@pytest.mark.parametrize("name", NAMES)
def test_tiles_of_columns_do_not_change_the_result(name, monkeypatch):
    monkeypatch.setattr(ours, "TILE", 1)  # blocks of 16 columns
    ref_labels = torch.arange(50) % 4
    call = {"ref_emb": embeddings_of(50, seed=1), "ref_labels": ref_labels}
    assert_equal(both(name, embeddings_of(12), torch.tensor(LABELS["classes"]), {}, **call), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_upstream_gradient_scales_and_strides_do_not_matter(name):
    wide = embeddings_of(12, dim=14).detach()
    labels = torch.tensor(LABELS["classes"])
    gradients = []
    for module, factor in ((pml, 1.0), (ours, -2.5)):
        embeddings = wide.clone().requires_grad_()
        loss = getattr(module, name)()(embeddings[:, ::2], labels) * factor
        gradients.append(torch.autograd.grad(loss, embeddings)[0] / factor)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("batch", "memory"), [(4, 12), (5, 12), (6, 6), (5, 7)])
def test_memory_equals_the_original_while_it_fills_and_wraps(name, batch, memory):
    modules = [module.CrossBatchMemory(getattr(module, name)(), 7, memory_size=memory) for module in (pml, ours)]
    for step in range(8):
        labels = torch.randint(0, 3, (batch,), generator=torch.Generator().manual_seed(step))
        results = []
        for module in modules:
            embeddings = embeddings_of(batch, seed=step)
            loss = module(embeddings, labels)
            results.append((loss, *torch.autograd.grad(loss, embeddings)))
        assert_equal(results, rtol=1e-9, atol=1e-12)
        assert modules[0].queue_idx == modules[1].queue_idx
        for buffer in ("embedding_memory", "label_memory"):
            assert torch.equal(getattr(modules[0], buffer), getattr(modules[1], buffer))
    assert set(modules[0].state_dict()) == set(modules[1].state_dict())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["mask", "miner", "tuple", "distance", "regularizer"])
def test_memory_in_its_other_ways_equals_the_original(name, way):
    modules = []
    for module in (pml, ours):
        options = {"distance": {"distance": LpDistance()}, "regularizer": {"embedding_regularizer": LpRegularizer()}}
        loss = getattr(module, name)(**options.get(way, {}))
        miner = MultiSimilarityMiner() if way == "miner" else None
        modules.append(module.CrossBatchMemory(loss, 7, memory_size=20, miner=miner))
    for step in range(4):
        labels = torch.tensor(LABELS["classes"])
        embeddings = embeddings_of(12, seed=step)
        call = {"enqueue_mask": torch.arange(12) % 3 == 0} if way == "mask" else {}
        if way == "tuple" and step == 0:  # places in the memory: those of the batch at the first step only
            call = {"indices_tuple": MultiSimilarityMiner()(embeddings, labels)}
        results = []
        for module in modules:
            leaf = embeddings.detach().clone().requires_grad_()
            loss = module(leaf, labels, **call)
            results.append((loss, *torch.autograd.grad(loss, leaf)))
        assert_equal(results, rtol=1e-9, atol=1e-12)


def test_memory_may_move_on_before_backward():
    memory, expected = (m.CrossBatchMemory(m.SupConLoss(), 7, memory_size=12) for m in (ours, pml))
    labels = torch.tensor([0, 0, 1, 1])
    gradients = []
    for module in (expected, memory):
        leaves = [embeddings_of(4, seed=step) for step in range(4)]
        total = sum(module(leaf, labels) for leaf in leaves)
        gradients.append(torch.autograd.grad(total, leaves))
    assert_equal(gradients, rtol=1e-9, atol=1e-12)


def test_memory_compares_a_single_embedding_with_others_only():
    memory = ours.CrossBatchMemory(ours.SupConLoss(), 7, memory_size=12)
    values = []
    for step, label in enumerate([0, 1, 0, 0]):
        values.append(float(memory(embeddings_of(1, seed=step), torch.tensor([label]))))
    assert values[0] == values[1] == 0
    seen = torch.cat([embeddings_of(1, seed=step) for step in range(4)]).detach()
    expected = pml.SupConLoss()(seen[3:], torch.tensor([0]), ref_emb=seen[:3], ref_labels=torch.tensor([0, 1, 0]))
    assert values[3] == pytest.approx(float(expected), rel=1e-9)


def test_memory_refuses_batches_that_do_not_fit():
    memory = ours.CrossBatchMemory(ours.SupConLoss(), 7, memory_size=3)
    with pytest.raises(ValueError, match="memory_size = 3 rows"):
        memory(embeddings_of(4), torch.arange(4))
    with pytest.raises(ValueError, match="a mask of 2"):
        memory(embeddings_of(3), torch.arange(3), enqueue_mask=torch.tensor([True, False]))


class Watch(TorchDispatchMode):
    """The largest tensor that is made, and how often a host would have to wait for its device."""

    def __init__(self):
        super().__init__()
        self.largest, self.waits = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.waits += by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2")
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("name", NAMES)
def test_labels_build_no_matrix_of_pairs_and_never_wait(name, monkeypatch):
    monkeypatch.setattr(ours, "TILE", 1024)
    labels, ref_labels = torch.arange(32) % 8, torch.arange(256) % 8
    ref_emb = embeddings_of(256, torch.float32, seed=1).detach()
    seen = {}
    for module in (pml, ours):
        embeddings = embeddings_of(32, torch.float32)
        with Watch() as watch:
            loss = getattr(module, name)()
            loss(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels).backward()
        seen[module] = watch
    assert seen[pml].largest >= 32 * 256 and seen[pml].waits > 0
    assert seen[ours].largest < 32 * 256 // 4 and seen[ours].waits == 0


def test_backend_can_be_chosen_by_name():
    labels = torch.tensor(LABELS["classes"])
    values = [ours.SupConLoss(backend=b)(embeddings_of(12), labels) for b in (None, "reference", "cpp")]
    assert all(float(value) == pytest.approx(float(values[0]), rel=1e-9) for value in values)
    with pytest.raises(ValueError, match="backend"):
        ours.SupConLoss(backend="fortran")(embeddings_of(12), labels)
