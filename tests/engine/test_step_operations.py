"""How many operations a training step is: each is at least a launch on a GPU. FixMatch+ABC+BaCon on WRN-28-2, bfloat16.

Counted on a CPU by what the dispatcher sees. BaCon's fused step, which a GPU takes, is run by Triton's interpreter;
without it a CPU has operations of its own for that part. The number does not depend on the sizes of images and batch.
"""

import os
from collections import Counter

import pytest
from run_cases import tiny

from bacon_fast import _C  # noqa: F401  the native operations are what makes the number small
from bacon_fast.engine.trainer import Trainer
from benchmarks.throughput.counters import DispatchCounter

FORWARD = {"models/convolution.py convolution": 28, "ops/batch_norm.py batch_norm_act_cpp": 25}
BACKWARD = {"backward convolution_backward": 28, "ops/batch_norm.py batch_norm_act_backward_cpp": 25}


def operations(tmp_path, **changes) -> Counter:
    """Of one step in the middle of an epoch, with BaCon's loss, by file and name; the views of the images left out."""
    config = tiny(tmp_path, backbone="wrn-28-2", batch_size=4, steps=1000, precision="bf16", **changes)
    trainer = Trainer(config.replace(epochs=100, **{"bacon.contrast_start": 0.0}))
    for _ in range(2):
        trainer.train_step()
    with DispatchCounter() as counter:
        trainer.train_step()
    trainer.logger.close()
    found = counter.counts.by_file
    assert counter.counts.operations == found.total()
    assert found.pop("ops/augment.py augment_views") == 1
    return found


def listed(found: Counter) -> str:
    return "\n".join(f"{count} {name}" for name, count in found.most_common())


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is off")
def test_a_step_with_the_gpus_losses_is_at_most_150_operations(tmp_path):
    found = operations(tmp_path, loss_backend="triton")
    assert found.total() <= 150, listed(found)
    assert (FORWARD | BACKWARD).items() <= found.items()  # the network is in it
    assert found["ops/bacon_step.py bacon_step_triton"] == 1


def test_a_step_of_a_cpu_is_at_most_164_operations(tmp_path):
    found = operations(tmp_path)
    assert found.total() <= 164, listed(found)
    assert (FORWARD | BACKWARD).items() <= found.items()


def test_parameters_and_images_are_not_cast_one_by_one(tmp_path):
    found = operations(tmp_path)
    assert not [name for name in found if name.startswith(("models/", "backward")) and name.endswith("_to_copy")]
    assert found["models/half.py _foreach_copy_"] == 2


def test_an_epoch_begins_with_a_few_operations(tmp_path):
    """The draw of a permutation was 121 operations: now keys, their order, and the rows that follow it."""
    trainer = Trainer(tiny(tmp_path, batch_size=4))
    trainer.train_step()
    sampler = trainer.batches.unlabeled_sampler
    first_of_next = -(-sampler.num_samples // sampler.batch_size)
    with DispatchCounter() as counter:
        sampler.prepare(first_of_next)
    trainer.logger.close()
    assert counter.counts.by_file["ops/philox.py philox_sort_keys"] == 1
    assert counter.counts.operations <= 8, listed(counter.counts.by_file)
