"""A LoRA run with AdamW, layer decay and warm-ups computes on two gloo ranks what it computes in one process."""

import sys
from pathlib import Path

import pytest
import rank_cases
import torch

from bacon_fast.engine import distributed

RECIPE = {
    "method": "fixmatch+abc+bacon",
    "backbone": "timm/test_vit",
    "image_size": 16,
    "bn_momentum": None,
    "sync_batchnorm": False,
    "train": "lora",
    "lora_rank": 2,
    "optimizer": "adamw",
    "lr": 1e-3,
    "layer_decay": 0.65,
    "warmup": 0.25,
    "ema_warmup": True,
}


def lora(run_dir: Path, weights: Path):
    return rank_cases.tiny(run_dir, weights=str(weights), **RECIPE)


def test_two_ranks_equal_one_process(tmp_path):
    timm = pytest.importorskip("timm", reason="needs timm: pip install 'bacon_fast[timm]'")
    torch.manual_seed(5)
    torch.save(timm.create_model("test_vit", img_size=16).state_dict(), tmp_path / "vit.pt")
    port = rank_cases.free_port()
    processes = [rank_cases.start(r, port, [__file__, str(tmp_path)]) for r in range(rank_cases.RANKS)]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0] * rank_cases.RANKS
    finally:
        for process in processes:
            process.kill()
    ranks = [torch.load(tmp_path / f"rank{r}.pt") for r in range(rank_cases.RANKS)]
    one = rank_cases.trajectory(lora(tmp_path / "one", tmp_path / "vit.pt"))
    assert len({step["total"] for step in one["losses"]}) == rank_cases.STEPS, "the run moves"
    for found in ranks:
        assert found["without_gradient"] == one["without_gradient"]
        for a, b in zip(found["losses"], one["losses"], strict=True):
            assert a == pytest.approx(b, rel=1e-5)
        assert found["state"].keys() == one["state"].keys()
        for name, value in found["state"].items():
            assert torch.equal(value, ranks[0]["state"][name]), name
    # Adam turns the rounding of a gradient near zero into a change of either sign: all but few agree.
    for name, value in one["state"].items():
        if name.startswith(("network.", "ema.network.")):
            change = (ranks[0]["state"][name] - value).abs().double()
            assert (change > 1e-6).double().mean() < 0.01, name


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with distributed.process_group(rank_cases.CPU, 60.0):
        result = rank_cases.trajectory(lora(folder / "two", folder / "vit.pt"))
        torch.save(result, folder / f"rank{distributed.rank()}.pt")
