"""`python -m tests.kills --count 200`: kills tiny runs at random moments, resumes them, and compares their ends.

Each run is killed (SIGKILL) at moments drawn over its whole life: while it is built, steps, evaluates, writes a
checkpoint or its summary. It is resumed until it ends, and may be killed again on the way. Its end is compared bit for
bit with that of a run which nobody killed: state, split, log and summary, all but the times. On the CPU, one thread.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from bacon_fast.data.datasets import load_dataset
from bacon_fast.engine.config import Config
from bacon_fast.engine.trainer import Trainer
from bacon_fast.files import read_record
from tests.run_cases import assert_equal_states, final_state, tiny

METHODS = ("fixmatch+abc+bacon", "supervised", "fixmatch+crest+pda", "remixmatch+abc", "sscl", "fixmatch+cossl")
TIMES = ("train_seconds", "steps_per_second")
LATER, SOONER = 1.1, 0.9
"""Factors of the span in which kills are drawn: after one that hit, and after one that came when the run had ended."""


def config(run_dir: Path, method: str) -> Config:
    return tiny(run_dir, method=method, steps=12, checkpoint_every=2, eval_every=6, log_every=3)


def start(config: Config) -> int:
    """The run in a process of its own, forked so that it need not load torch; returns its number."""
    config.run.run_dir.parent.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return child
    try:
        with open(os.devnull, "w") as silence:
            sys.stdout = sys.stderr = silence
            resume = (config.run.run_dir / "config.json").exists()
            Trainer(config.replace(resume=resume)).fit()
    except BaseException as error:
        (config.run.run_dir.parent / "error").write_text(repr(error))
        os._exit(1)
    os._exit(0)


def run_to_its_end(config: Config, moments: random.Random | None = None, spans: dict[str, float] | None = None) -> int:
    """Starts the run until it ends, and kills it at one moment of each start but every third. Returns the kills.

    spans: seconds from a start in which the kill is drawn, by method; kept so that about every second one hits.
    """
    kills = starts = 0
    while True:
        child, starts = start(config), starts + 1
        kill = moments is not None and starts % 3
        if kill:
            time.sleep(moments.uniform(0, spans[config.method]))
            os.kill(child, signal.SIGKILL)  # one that ended waits to be asked for its status: it is still ours
        _, status = os.waitpid(child, 0)
        hit = os.WIFSIGNALED(status)
        if kill:
            spans[config.method] *= LATER if hit else SOONER
        if hit:
            kills += 1
        elif status:
            raise RuntimeError((config.run.run_dir.parent / "error").read_text())
        else:
            return kills


def ends(run_dir: Path) -> dict:
    """What a run left, without times."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "state": final_state(run_dir),
        "split": read_record(run_dir / "split.json", key="hash"),
        "summary": read_record(run_dir / "summary.json"),
        "rows": [{name: value for name, value in row.items() if name not in TIMES} for row in rows],
        "files": sorted(path.name for path in run_dir.iterdir()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="kills to reach")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--seconds", type=float, default=600.0, help="no further run begins after that many")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load_dataset("digits")  # what is imported late is imported before the first fork
    moments, begin, kills, runs = random.Random(options.seed), time.monotonic(), 0, 0
    whole: dict[str, dict] = {}
    spans: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        while kills < options.count and time.monotonic() - begin < options.seconds:
            method = METHODS[runs % len(METHODS)]
            if method not in whole:
                started = time.monotonic()
                run_to_its_end(config(Path(folder) / "whole" / method, method))
                whole[method], spans[method] = ends(Path(folder) / "whole" / method), time.monotonic() - started
            run_dir = Path(folder) / "killed" / method
            kills += run_to_its_end(config(run_dir, method), moments, spans)
            assert_equal_states(ends(run_dir), whole[method], method)
            shutil.rmtree(run_dir)
            runs += 1
    seconds = time.monotonic() - begin
    print(f"{kills} kills in {runs} runs of {len(whole)} methods: every end equal bit for bit ({seconds:.0f} s)")
    sys.exit(kills < options.count)


if __name__ == "__main__":
    main()
