"""Two processes train as one: the same losses, gradients and state as a single process with the same global batch.

The oracle is the single process. Backbones compute in float64 here (rank_cases.in_float64), the rest in float32.
"""

import signal

import pytest
import rank_cases
import torch
from rank_cases import ADAM, LAYOUTS, PREDICTED, RANKS, Trainer, new_generation, tagged, tiny, trajectory

from bacon_fast.engine.checkpoint import list_checkpoints
from bacon_fast.engine.evaluation import predict
from bacon_fast.methods import METHODS
from bacon_fast.reference.memory_bank import SCALE


def assert_follows(two: dict, one: dict) -> None:
    assert two["without_gradient"] == one["without_gradient"]
    for step, (a, b) in enumerate(zip(two["losses"], one["losses"], strict=True)):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-8), f"step {step}"
    assert two["state"].keys() == one["state"].keys()
    for name, value in one["state"].items():
        found = two["state"][name]
        if name.endswith("class_sums"):  # fixed point
            found, value = found / SCALE, value / SCALE
        torch.testing.assert_close(found, value, rtol=1e-5, atol=2e-6, msg=f"{name}: {found} instead of {value}")


def assert_same_bits(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_every_method_computes_on_two_ranks_what_it_computes_on_one(tmp_path, ranks, method):
    one = trajectory(tiny(tmp_path / "run", method=method))
    assert len({step["total"] for step in one["losses"]}) == rank_cases.STEPS, "the run moves"
    assert_follows(ranks[0]["methods"][method], one)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_and_state_of_every_method_are_the_same_bits_on_all_ranks(ranks, method):
    assert_same_bits(ranks[0]["methods"][method]["state"], ranks[1]["methods"][method]["state"])


def test_bank_counts_and_centers_are_filled_by_the_rows_of_all_ranks(ranks):
    state = ranks[1]["methods"]["fixmatch+abc+bacon"]["state"]
    rows = 8 + 2 * 8  # of the global batch, all of them reliable at this threshold, an epoch being longer
    assert state["regularizer.bank.written"].sum() > rank_cases.STEPS * rows * 0.9
    assert state["regularizer.bank.has_center"].sum() > 1


def test_the_sums_of_simpro_are_of_the_rows_of_all_ranks(ranks):
    state = ranks[1]["methods"]["fixmatch+simpro"]["state"]
    assert state["balancer.labeled_sums"].sum() == 8, "of the global batch of the step behind the last estimate"
    assert state["balancer.unlabeled_sums"].any()


def test_the_projection_has_no_gradient_before_its_phase_and_is_not_decayed(ranks):
    before, *_, last = ranks[0]["methods"]["fixmatch+abc+bacon"]["without_gradient"]
    assert before == ["regularizer.projection.bias", "regularizer.projection.weight"] and last == []


def test_adam_follows_too(tmp_path, ranks):
    one = trajectory(tiny(tmp_path / "run", **ADAM))
    # Adam divides by the root of a mean square near zero: rounding of 1e-16 in a gradient of 1e-9 shows.
    for a, b in zip(ranks[0]["adam"]["losses"], one["losses"]):
        assert a == pytest.approx(b, rel=1e-4)
    assert_same_bits(ranks[0]["adam"]["state"], ranks[1]["adam"]["state"])


def test_a_new_generation_starts_on_all_ranks_from_the_same_network(tmp_path, ranks):
    assert_follows(
        ranks[0]["generation"], trajectory(tiny(tmp_path / "run", method="fixmatch+bacon"), prepare=new_generation)
    )
    assert_same_bits(ranks[0]["generation"]["state"], ranks[1]["generation"]["state"])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_works_on_two_ranks(tmp_path, ranks, precision):
    config = tiny(tmp_path / "run", precision=precision, method="fixmatch+abc", threshold=0.0)
    one = trajectory(config, float64=False)
    for a, b in zip(ranks[0][precision]["losses"][:2], one["losses"]):
        assert a == pytest.approx(b, rel=0.05, abs=0.05)  # 8 bits of mantissa, and other sums
    assert_same_bits(ranks[0][precision]["state"], ranks[1][precision]["state"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_gathered_in_the_order_of_one_process_and_back(ranks, layout):
    total = RANKS * (layout[0] + layout[1] * layout[2])
    rows = torch.arange(total).double()
    for r in range(RANKS):
        result = ranks[r]["gathering"][LAYOUTS.index(layout)]
        assert torch.equal(result["gathered"], torch.stack([rows, rows / 2], dim=1))
        own = tagged(*layout, r)
        assert torch.equal(result["own"], own)
        # The loss is the same on all ranks, and DistributedDataParallel divides the sum of their gradients by RANKS.
        assert torch.equal(result["gradient"], RANKS * own)


def test_only_rank_0_writes(ranks, ranks_folder):
    written = " ".join(ranks[0]["written"])
    for name in ("metrics.jsonl", "metrics.csv", "step-00000012.pt", "summary.json"):
        assert name in written  # so the watch sees what there is to see
    assert ranks[1]["written"] == []
    assert [p.name for p in list_checkpoints(ranks_folder / "own_statistics" / "checkpoints")][-1] == "step-00000012.pt"


def test_without_synchronization_statistics_are_each_ranks_own_until_rank_0s_are_taken(ranks):
    assert_same_bits(ranks[0]["fitted"], ranks[1]["fitted"])  # just saved
    one, two = ranks[0]["own_statistics"], ranks[1]["own_statistics"]
    different = {name for name in one if not torch.equal(one[name], two[name])}
    assert different and all("running" in name for name in different)
    for name in one:
        assert torch.equal(ranks[1]["shared_statistics"][name], one[name])


def test_a_checkpoint_of_two_ranks_continues_on_one(ranks, ranks_folder):
    trainer = Trainer(tiny(ranks_folder / "own_statistics", sync_batchnorm=False, resume=True))
    trainer.logger.close()
    assert trainer.step == 12
    assert_same_bits(rank_cases.state_of(trainer), ranks[0]["fitted"])


def test_images_are_divided_over_the_ranks_and_predicted_by_all(ranks, ranks_folder):
    trainer = Trainer(tiny(ranks_folder / "own_statistics", sync_batchnorm=False, resume=True))
    trainer.logger.close()
    trainer.ema.load_state_dict(
        {name.removeprefix("ema."): v for name, v in ranks[0]["shared_statistics"].items() if name.startswith("ema.")}
    )
    for case, n in enumerate(PREDICTED):
        images = trainer.dataset.test_images[:n]
        expected = predict(trainer.ema.network, trainer.batches.augment, images, trainer.device)
        for r in range(RANKS):
            for found, wanted in zip(ranks[r]["predictions"][case], expected):
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(ranks[0]["predictions"][case], ranks[1]["predictions"][case]))


def test_what_cannot_be_trained_together_is_refused_on_all_ranks(ranks):
    for r in range(RANKS):
        assert ranks[r]["odd_batch"] == "batch_size: expected a multiple of the number of processes, 2, found 7"
        assert ranks[r]["two_seeds"] == "seed: expected the same value on all ranks, found 0 on rank 0 and 1 on rank 1"
        assert "holds a run already; add --resume" in ranks[r]["run_exists"]


def test_a_run_that_diverges_ends_on_all_ranks(ranks, ranks_folder):
    for r in range(RANKS):
        assert "not finite" in ranks[r]["diverged"] and "try a smaller --lr" in ranks[r]["diverged"]
    assert list_checkpoints(ranks_folder / "diverged" / "checkpoints") == []


def test_a_signal_on_one_rank_stops_all_after_the_same_step(ranks):
    assert ranks[0]["stopped"] == ranks[1]["stopped"]
    signum, step = ranks[0]["stopped"]
    assert signum == signal.SIGTERM and step >= 5
