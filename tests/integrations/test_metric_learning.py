"""The drop-in losses against pytorch-metric-learning 2.9 itself: values, gradients, reducers, memory."""

import pytest
import torch
from pytorch_metric_learning import losses as pml
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance
from pytorch_metric_learning.miners import MultiSimilarityMiner
from pytorch_metric_learning.reducers import AvgNonZeroReducer, DoNothingReducer, MeanReducer, ThresholdReducer
from pytorch_metric_learning.regularizers import LpRegularizer
from pytorch_metric_learning.utils import distributed as pml_distributed
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
    with pytest.raises(ValueError, match=r"memory_size = 3 rows to keep.*found 5 rows, a mask of 5, 4 to keep"):
        memory(embeddings_of(5), torch.arange(5), enqueue_mask=torch.tensor([True, True, True, True, False]))


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_may_be_larger_than_the_memory_if_its_masked_part_is_not(name):
    results, mask = [], torch.arange(12) % 3 == 0  # 4 of 12, into 5 places
    for module in (pml, ours):
        memory, found = module.CrossBatchMemory(getattr(module, name)(), 7, memory_size=5), []
        for step in range(3):
            leaf = embeddings_of(12, seed=step)
            loss = memory(leaf, torch.tensor(LABELS["classes"]), enqueue_mask=mask)
            found += [loss, *torch.autograd.grad(loss, leaf), memory.embedding_memory.clone()]
        results.append(found)
    assert_equal(results, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("with_ref", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32, torch.int32, torch.uint64]
)
@pytest.mark.parametrize("name", NAMES)
def test_labels_of_any_integer_dtype(name, dtype, with_ref):
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0])
    wide = labels * -(2**62) if dtype == torch.uint64 else labels  # beyond int64's half of the numbers
    call = {"ref_emb": embeddings_of(12, seed=1), "ref_labels": labels.flip(0)} if with_ref else {}
    expected, _ = both(name, embeddings_of(12), labels, {}, **call)
    if with_ref:
        call["ref_labels"] = wide.flip(0).to(dtype)
    loss_inputs = embeddings_of(12)
    loss = getattr(ours, name)()(loss_inputs, wide.to(dtype), **call)
    torch.testing.assert_close(loss, expected[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, loss_inputs)[0], expected[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16])
@pytest.mark.parametrize("name", NAMES)
def test_memory_of_labels_of_any_integer_dtype(name, dtype):
    results = []
    for module in (pml, ours):
        memory = module.CrossBatchMemory(getattr(module, name)(), 7, memory_size=20)
        for step in range(3):
            leaf = embeddings_of(12, seed=step)
            loss = memory(leaf, (torch.arange(12) % 2).to(dtype))
        results.append((loss, *torch.autograd.grad(loss, leaf)))
    assert_equal(results, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("case", ["classes", "no positive", "one class", "rows without positives"])
@pytest.mark.parametrize("name", NAMES)
def test_features_that_are_not_finite_give_nan_as_in_the_original(name, case, value):
    embeddings = embeddings_of(12).detach()
    embeddings[3, 2] = value
    for module in (pml, ours):
        assert getattr(module, name)()(embeddings, torch.tensor(LABELS[case])).isnan()
    for backend in ("reference", "cpp"):
        assert getattr(ours, name)(backend=backend)(embeddings, torch.tensor(LABELS[case])).isnan()


@pytest.mark.parametrize("name", NAMES)
def test_nan_in_one_row_is_not_left_out_of_the_mean(name):
    embeddings, ref_emb = embeddings_of(12).detach(), embeddings_of(12, seed=1)
    embeddings[3, 2] = float("nan")
    labels = torch.tensor(LABELS["classes"])
    assert getattr(ours, name)()(embeddings, labels, ref_emb=ref_emb, ref_labels=labels.clone()).isnan()
    assert getattr(ours, name)()(ref_emb, labels, ref_emb=embeddings, ref_labels=labels.clone()).isnan()


@pytest.mark.parametrize("scale", [1e20, 1e30])
@pytest.mark.parametrize("name", NAMES)
def test_huge_embeddings_keep_their_norm(name, scale):
    """Their squares are beyond float32; the loss looks at directions alone."""
    embeddings, labels = embeddings_of(12).detach().float(), torch.tensor(LABELS["classes"])
    expected = getattr(pml, name)()(embeddings, labels)
    torch.testing.assert_close(getattr(ours, name)()(embeddings * scale, labels), expected)


def replacement(name: str, module) -> type:
    """A user's subclass of the loss, the same of the original and of ours, that changes one method."""
    parent = getattr(module, {"mat_based_loss": "SupConLoss"}.get(name, "NTXentLoss"))

    def changed(self, *arguments):
        result = getattr(super(cls, self), name)(*arguments)
        return {"loss": {**result["loss"], "losses": result["loss"]["losses"] * 3}}

    cls = type(parent.__name__, (parent,), {name: changed})  # CrossBatchMemory goes by the class's name
    return cls


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("name", ["_compute_loss", "mat_based_loss", "pair_based_loss", "compute_loss"])
def test_overridden_methods_are_called(name, memory):
    results, labels = [], torch.tensor(LABELS["classes"])
    for module in (pml, ours):
        loss, leaf = replacement(name, module)(), embeddings_of(12)
        if memory:
            loss = module.CrossBatchMemory(loss, 7, memory_size=20)
            loss(embeddings_of(12, seed=1), labels)
        value = loss(leaf, labels)
        results.append((value, *torch.autograd.grad(value, leaf)))
    assert_equal(results, rtol=1e-9, atol=1e-12)
    plain = getattr(pml, replacement(name, pml).__name__)()(embeddings_of(12), labels)
    assert memory or float(results[1][0]) == pytest.approx(3 * float(plain), rel=1e-9)


def test_a_subclass_that_replaces_nothing_is_still_fused():
    class Named(ours.SupConLoss):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.called = 0

        def get_default_reducer(self):
            return MeanReducer()

        def losses_of(self, *arguments):
            self.called += 1
            return super().losses_of(*arguments)

    loss, labels = Named(), torch.tensor(LABELS["classes"])
    value = loss(embeddings_of(12), labels)
    torch.testing.assert_close(value, pml.SupConLoss(reducer=MeanReducer())(embeddings_of(12), labels))
    assert loss.called == 1


def test_what_a_user_hangs_in_is_called():
    labels, seen = torch.tensor(LABELS["classes"]), []
    loss = ours.SupConLoss()
    loss.distance.register_forward_hook(lambda *_: seen.append("distance"))
    loss(embeddings_of(12), labels)
    loss = ours.NTXentLoss()
    loss._compute_loss = lambda *arguments: seen.append("assigned") or pml.NTXentLoss._compute_loss(loss, *arguments)
    loss(embeddings_of(12), labels)
    loss = ours.NTXentLoss()
    loss.register_forward_hook(lambda *_: seen.append("loss"))
    ours.CrossBatchMemory(loss, 7, memory_size=20)(embeddings_of(12), labels)

    class Memory(ours.CrossBatchMemory):
        def create_indices_tuple(self, *arguments):
            seen.append("tuple")
            return super().create_indices_tuple(*arguments)

    Memory(ours.NTXentLoss(), 7, memory_size=20)(embeddings_of(12), labels)
    assert seen == ["distance", "assigned", "loss", "tuple"]


@pytest.mark.parametrize("name", NAMES)
def test_a_temperature_that_is_a_tensor_can_be_learned(name):
    results = []
    for module in (pml, ours):
        temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        leaf = embeddings_of(12)
        loss = getattr(module, name)(temperature=temperature)(leaf, torch.tensor(LABELS["classes"]))
        results.append((loss, *torch.autograd.grad(loss, [leaf, temperature])))
    assert_equal(results, rtol=1e-9, atol=1e-12)
    assert results[1][2] != 0


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_are_right_or_refused(name):
    labels, results = torch.tensor(LABELS["classes"]), []
    for loss in (getattr(pml, name)(temperature=0.5), getattr(ours, name)(temperature=0.5, backend="reference")):
        leaf = embeddings_of(12)
        (first,) = torch.autograd.grad(loss(leaf, labels), leaf, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), leaf))
    assert_equal(results, rtol=1e-8, atol=1e-11)
    leaf = embeddings_of(12)
    (first,) = torch.autograd.grad(getattr(ours, name)()(leaf, labels), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend=.reference.*has"):
        torch.autograd.grad(first.square().sum(), leaf)


@pytest.mark.parametrize("name", NAMES)
def test_functional_transforms_name_the_backend_that_can(name):
    labels, leaf = torch.tensor(LABELS["classes"]), embeddings_of(12)
    expected = torch.autograd.grad(getattr(pml, name)()(leaf, labels), leaf)[0]
    loss = getattr(ours, name)(backend="reference")
    torch.testing.assert_close(torch.func.grad(lambda x: loss(x, labels))(leaf), expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(RuntimeError, match=f"{name}: torch.func .*backend='reference' is, found backend=None"):
        torch.func.grad(lambda x: getattr(ours, name)()(x, labels))(leaf)


# --- inside the wrappers of pytorch-metric-learning ------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_self_supervised_loss(name, symmetric):
    results = []
    for module in (pml, ours):
        leaves = embeddings_of(9), embeddings_of(9, seed=1)
        loss = pml.SelfSupervisedLoss(getattr(module, name)(), symmetric=symmetric)(*leaves)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    assert_equal(results, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mined", [False, True])
def test_multiple_losses(mined):
    results, labels = [], torch.tensor(LABELS["classes"])
    for module in (pml, ours):
        leaf = embeddings_of(12)
        parts = [module.SupConLoss(), module.NTXentLoss(), pml.ContrastiveLoss()]
        miners = [MultiSimilarityMiner(), None, None] if mined else None
        loss = pml.MultipleLosses(parts, miners=miners, weights=[1, 0.5, 2])(leaf, labels)
        results.append((loss, *torch.autograd.grad(loss, leaf)))
    assert_equal(results, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("inner", ["loss", "efficient", "memory", "memory and mask", "references"])
def test_distributed_loss_wrapper(name, inner, monkeypatch):
    """As the first of two processes; the other's rows are those of another seed."""

    def other_ranks(x):
        return embeddings_of(len(x), seed=7).detach() if x.is_floating_point() else x.flip(0)

    monkeypatch.setattr(pml_distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(pml_distributed, "all_gather", other_ranks)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    results, labels = [], torch.tensor(LABELS["classes"])
    for module in (pml, ours):
        loss, leaf, call = getattr(module, name)(), embeddings_of(12), {}
        if inner.startswith("memory"):
            loss = module.CrossBatchMemory(loss, 7, memory_size=30)
            call = {"enqueue_mask": torch.arange(12) % 2 == 0} if "mask" in inner else {}
        if inner == "references":
            call = {"ref_emb": embeddings_of(12, seed=2), "ref_labels": labels.clone()}
        value = pml_distributed.DistributedLossWrapper(loss, efficient=inner == "efficient")(leaf, labels, **call)
        results.append((value, *torch.autograd.grad(value, leaf)))
    assert_equal(results, rtol=1e-9, atol=1e-12)


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
