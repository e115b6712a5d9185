"""Command line: ``python -m bacon_fast.integrations.usb --c config.yaml``."""

import argparse
import random
from pathlib import Path

import numpy as np
import ruamel.yaml
import torch
from semilearn.algorithms import get_algorithm
from semilearn.core.utils import TBLog, get_logger, get_net_builder
from semilearn.imb_algorithms import get_imb_algorithm
from semilearn.lighting import get_config

from bacon_fast.integrations.usb.algorithms import SyncFree
from bacon_fast.integrations.usb.registry import ALGORITHMS, IMB_ALGORITHMS, MISSING_TRACKERS


def main(arguments: list[str] | None = None) -> dict:
    """Train from a USB configuration file on one device; returns USB's results and prints them.

    USB ships its configurations with ``resume: True`` and the run's own checkpoint. A first run has none: it starts at
    the beginning, and prints a line that says so.

    Raises:
        SystemExit: if the configuration asks for something this runner does not do, or its run directory is taken.
    """
    summary = main.__doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bacon_fast.integrations.usb", description=summary)
    parser.add_argument("--c", type=Path, required=True, metavar="CONFIG.yaml", help="a configuration file of USB")
    path = parser.parse_args(arguments).c
    config = ruamel.yaml.YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    for key, registry in (("algorithm", ALGORITHMS), ("imb_algorithm", IMB_ALGORITHMS)):
        if config.get(key) not in (None, *registry.keys()):
            raise SystemExit(f"{key}: expected one of {', '.join(registry.keys())}, found {config[key]!r}")
    for name in MISSING_TRACKERS:
        if config.get(f"use_{name}"):
            raise SystemExit(f"use_{name}: {name} is not installed; pip install {name}, or leave use_{name} out")
    args = get_config(config)
    args.distributed = args.multiprocessing_distributed = False
    args.rank, args.world_size = 0, 1
    asked = None if args.gpu == "None" else args.gpu  # the word, as YAML has it
    args.gpu = (asked or 0) if torch.cuda.is_available() else None
    run_dir = Path(args.save_dir) / args.save_name
    if run_dir.exists() and not args.resume:
        raise SystemExit(f"{run_dir} exists: choose another save_name, or set resume and load_path")
    if args.resume and not (args.load_path and Path(args.load_path).is_file()):
        if not args.load_path or any(run_dir.glob("*.pth")):  # a run that a mistyped path would write over
            raise SystemExit(f"load_path: expected the checkpoint to resume from, found {args.load_path!r}")
        print(f"no checkpoint {args.load_path} yet: starting at the beginning")
        args.resume = False

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    log = TBLog(str(run_dir), "tensorboard", use_tensorboard=args.use_tensorboard)
    build = get_algorithm if args.imb_algorithm is None else get_imb_algorithm
    algorithm = build(
        args, get_net_builder(args.net, args.net_from_name), log, get_logger(args.save_name, str(run_dir))
    )
    if args.gpu is not None:
        torch.cuda.set_device(args.gpu)
        algorithm.model, algorithm.ema_model = algorithm.model.cuda(), algorithm.ema_model.cuda()
    elif not isinstance(algorithm, SyncFree):
        raise SystemExit(f"{args.algorithm} needs a CUDA device; fixmatch, abc and bacon also run without")
    if args.resume:
        algorithm.load_model(args.load_path)
    for stage in ("warmup", "train", "finetune"):
        if hasattr(algorithm, stage):
            getattr(algorithm, stage)()
    for name, value in algorithm.results_dict.items():
        print(f"{name}: {value}")
    return algorithm.results_dict


if __name__ == "__main__":
    main()
