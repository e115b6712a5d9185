"""Two processes keep the same weights and end after the same step; `python test_selection_ranks.py FOLDER` is one."""

import sys
from pathlib import Path

import rank_cases
import torch

from bacon_fast.engine import distributed, selection
from bacon_fast.engine.trainer import Trainer

CHANGES = {"validation": None, "eval_every": 1, "ema": 0.0, "lr": 0.1, "bn_momentum": 0.5, "log_every": 100}
CHANGES |= {"method": "fixmatch+abc", "select": "validation", "patience": 2}


def test_ranks_keep_the_same_weights_and_end_together(tmp_path):
    port = rank_cases.free_port()
    processes = [rank_cases.start(r, port, [__file__, str(tmp_path)]) for r in range(rank_cases.RANKS)]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0] * rank_cases.RANKS
    finally:
        for process in processes:
            process.kill()
    one, two = (torch.load(tmp_path / f"rank{r}.pt") for r in range(rank_cases.RANKS))
    assert one["step"] == two["step"] < 12 and one["selected"] == two["selected"] == one["step"] - 2
    assert one["validation"] == two["validation"] == 0.2  # of None, as there are enough labels
    assert one["losses"] == two["losses"] and one["choice"] == two["choice"]
    assert one["tensors"].keys() == two["tensors"].keys() and one["tensors"]
    assert all(torch.equal(tensor, two["tensors"][name]) for name, tensor in one["tensors"].items())


def main(folder: Path) -> None:
    selection.LEAST_FOR_PATIENCE = 10
    with distributed.process_group(torch.device("cpu"), 60.0):
        # Each rank has running statistics of its own, of which the first one's are kept.
        trainer = Trainer(rank_cases.tiny(folder / "run", **CHANGES, sync_batchnorm=False))
        summary = trainer.fit()
        found = {"step": trainer.step, "selected": trainer.selected_step, "choice": summary["choice"]}
        found["validation"] = trainer.config.data.validation
        found |= {"losses": [row[selection.LOSS] for row in trainer.history.rows], "tensors": trainer.kept.tensors}
        torch.save(found, folder / f"rank{distributed.rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
