"""The USB integration inside the real USB: its registry, its loaders, its training loop, its own classes as oracle.

Needs USB (`bacon_fast.integrations.usb` says how it is installed), which has an environment of its own.
"""

import contextlib
import copy
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

if find_spec("semilearn") is None:
    pytest.skip("USB is not installed", allow_module_level=True)

from bacon_fast.integrations import usb  # isort: skip  (before semilearn, which it may have to help to be imported)
import semilearn.nets
from semilearn.algorithms.fixmatch import FixMatch as USBFixMatch
from semilearn.core.hooks import Hook, TimerHook
from semilearn.core.utils.misc import EMA as USBEMA
from semilearn.datasets.cv_datasets.datasetbase import BasicDataset
from semilearn.imb_algorithms import get_imb_algorithm
from semilearn.imb_algorithms.abc.abc import ABC as USBABC
from semilearn.lighting import get_config

from bacon_fast.integrations.usb.__main__ import main
from bacon_fast.integrations.usb.registry import ALGORITHMS, IMB_ALGORITHMS, MISSING_TRACKERS
from bacon_fast.models import build_backbone

K, LABELED, UNLABELED = 10, 60, 90
# A run in which no step of a test is one of evaluation or logging.
LONG = {"num_train_iter": 1000, "num_eval_iter": 1000, "num_log_iter": 1000}


@pytest.mark.parametrize(("name", "theirs"), [("wrn-28-2-usb", "wrn_28_2"), ("wrn-37-2-usb", "wrn_var_37_2")])
def test_backbone_is_usbs(name, theirs):
    torch.manual_seed(0)
    ours, original = build_backbone(name).double(), getattr(semilearn.nets, theirs)(num_classes=K).double()
    # Both list their layers in order of depth; USB's has norms without effect, which we leave out.
    layers = [[m for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (ours, original)]
    idle = {m.bn1 for m in original.modules() if hasattr(m, "equalInOut") and not m.equalInOut}
    first = next(m for m in original.modules() if hasattr(m, "equalInOut")).bn1
    norms = [
        [m for m in ours.modules() if isinstance(m, nn.BatchNorm2d)],
        [m for m in original.modules() if isinstance(m, nn.BatchNorm2d) and (m is first or m not in idle)],
    ]
    for mine, other in (layers, norms):
        assert len(mine) == len(other)
        for a, b in zip(mine, other):
            assert getattr(a, "eps", None) == getattr(b, "eps", None)
            a.load_state_dict(b.state_dict())
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(images), original(images, only_feat=True), rtol=1e-10, atol=1e-12)


class TinyNet(nn.Module):
    """A backbone with USB's interface and with BatchNorm, so that there are buffers to average."""

    def __init__(self, num_classes, **_):
        super().__init__()
        self.num_features = 16
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.classifier = nn.Linear(16, num_classes)

    def forward(self, x, **_):
        features = self.body(x).flatten(1)
        return {"logits": self.classifier(features), "feat": features}

    def group_matcher(self, coarse=False, prefix=""):
        return {"stem": rf"^{prefix}body", "blocks": rf"^{prefix}classifier"}


def to_tensor(image):
    return torch.as_tensor(np.asarray(image)).permute(2, 0, 1).float() / 255


def noisy(image):
    return to_tensor(image) + 0.1 * torch.randn(3, 8, 8)


def toy_datasets(*_, **__):
    digits = load_digits()
    images = np.repeat((digits.images[..., None] * 15.9).astype(np.uint8), 3, axis=3)
    parts = np.split(np.arange(len(images))[:250], [LABELED, LABELED + UNLABELED])
    labeled, unlabeled, test = ((images[i], digits.target[i].tolist()) for i in parts)
    return {
        "train_lb": BasicDataset("fixmatch", *labeled, K, noisy, False, noisy),
        "train_ulb": BasicDataset("fixmatch", *unlabeled, K, noisy, True, noisy),
        "eval": BasicDataset("fixmatch", *test, K, to_tensor, False, None),
        "test": None,
    }


@pytest.fixture(autouse=True)
def toy_usb(monkeypatch):
    """USB on toy data and without a GPU: `.cuda()` leaves a tensor where it is."""
    monkeypatch.setattr("semilearn.core.algorithmbase.get_dataset", toy_datasets)
    monkeypatch.setattr(semilearn.nets, "tiny", TinyNet, raising=False)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor)


def config(tmp_path, **changes):
    return {
        "algorithm": "fixmatch",
        "imb_algorithm": None,
        "net": "tiny",
        "dataset": "toy",
        "num_classes": K,
        "batch_size": 6,
        "uratio": 2,
        "epoch": 2,
        "num_train_iter": 8,
        "num_eval_iter": 4,
        "num_log_iter": 2,
        "num_workers": 0,
        "ema_m": 0.9,
        "p_cutoff": 0.12,
        "save_dir": str(tmp_path),
        "save_name": "run",
        "seed": 0,
        **changes,
    }


def build(tmp_path, algorithm=None, imbalanced=None, **changes):
    """An algorithm of the given classes, as USB's builders put it together, ready to train on a CPU."""
    name = {None: None, USBABC: "abc", usb.ABC: "abc", usb.BaCon: "bacon"}[imbalanced]
    args = get_config(config(tmp_path, imb_algorithm=name, **changes))
    args.distributed, args.gpu = False, None
    torch.manual_seed(0)
    np.random.seed(0)
    bases = (imbalanced, algorithm) if imbalanced else (algorithm,)
    built = type("Dummy", bases, {})(args, TinyNet)
    if algorithm is USBFixMatch:
        built.register_hook(Hook(), "TimerHook", "LOW")  # USB's own needs a GPU
        if imbalanced:
            built.model, built.ema_model = Wrapped(built.model), Wrapped(built.ema_model)
    return built


class Wrapped(nn.Module):
    """Stands for DistributedDataParallel, without which USB's ABC does not run."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


class SyncCounter(TorchDispatchMode):
    """Counts operations for which a host would have to wait for its device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")
        return func(*args, **(kwargs or {}))


def one_step(algorithm, watch=None):
    """One training step with its hooks, watched by a context manager once the batch is there."""
    loaders = algorithm.loader_dict
    data = {**next(iter(loaders["train_lb"])), **next(iter(loaders["train_ulb"]))}
    batch = algorithm.process_batch(**data)
    with watch or contextlib.nullcontext():
        algorithm.call_hook("before_train_step")
        algorithm.out_dict, algorithm.log_dict = algorithm.train_step(**batch)
        loss = algorithm.out_dict["loss"].detach()
        algorithm.call_hook("after_train_step")
    algorithm.it += 1
    return batch, loss


def started(algorithm):
    algorithm.epoch = 0
    algorithm.model.train()
    algorithm.call_hook("before_run")
    return algorithm


def test_registered_under_usbs_names(tmp_path):
    assert ALGORITHMS["fixmatch"] is usb.FixMatch
    assert IMB_ALGORITHMS["abc"] is usb.ABC and IMB_ALGORITHMS["bacon"] is usb.BaCon
    args = get_config(config(tmp_path, imb_algorithm="bacon"))
    assert (args.bacon_loss_ratio, args.bacon_start, args.abc_p_cutoff) == (1.0, 0.5, 0.95)
    args.distributed, args.gpu = False, None
    algorithm = get_imb_algorithm(args, TinyNet, None, None)
    names = [cls.__name__ for cls in type(algorithm).__mro__]
    assert names.index("BaCon") < names.index("ABC") < names.index("FixMatch") < names.index("AlgorithmBase")
    assert type(algorithm.hooks_dict["EMAHook"]) is usb.EMAHook
    assert type(algorithm.hooks_dict["TimerHook"]) is usb.TimerHook
    order = list(algorithm.hooks_dict)
    assert order.index("ParamUpdateHook") < order.index("EMAHook") < order.index("EvaluationHook")


@pytest.mark.parametrize("use_cat", [True, False])
@pytest.mark.parametrize("imbalanced", [None, (USBABC, usb.ABC)])
def test_training_equals_usbs_own_classes(tmp_path, imbalanced, use_cat):
    theirs_imb, ours_imb = imbalanced or (None, None)
    theirs = build(tmp_path / "theirs", USBFixMatch, theirs_imb, use_cat=use_cat, abc_p_cutoff=0.12)
    theirs.train()
    ours = build(tmp_path / "ours", usb.FixMatch, ours_imb, use_cat=use_cat, abc_p_cutoff=0.12)
    before = copy.deepcopy(ours.model.state_dict())
    ours.train()
    assert ours.it == theirs.it == 8
    for mine, other in ((ours.model, theirs.model), (ours.ema_model, theirs.ema_model)):
        expected = theirs.check_prefix_state_dict(other.state_dict())
        assert list(mine.state_dict()) == list(expected)
        for name, value in mine.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)
    name = "backbone.classifier.weight" if imbalanced else "classifier.weight"
    assert not torch.equal(ours.model.state_dict()[name], before[name])
    for name, value in theirs.log_dict.items():
        assert float(ours.log_dict[name]) == pytest.approx(float(value), rel=1e-5), name
    assert ours.best_eval_acc == pytest.approx(theirs.best_eval_acc)
    assert 0 < ours.log_dict["train/util_ratio"] <= 1


@pytest.mark.parametrize("imbalanced", [None, usb.ABC, usb.BaCon])
def test_a_step_never_waits_for_the_device(tmp_path, imbalanced, monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: waits.append(1))
    algorithm = started(build(tmp_path, usb.FixMatch, imbalanced, bacon_start=0.0, **LONG))
    one_step(algorithm)
    counter = SyncCounter()
    one_step(algorithm, counter)
    assert counter.count == 0 and not waits


def test_usbs_own_step_waits_for_the_device(tmp_path, monkeypatch):
    """The counter above counts: USB reads four values a step and synchronizes twice."""
    waits = []
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda _: 1.0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: waits.append(1))
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: event)
    algorithm = build(tmp_path, USBFixMatch, **LONG)
    algorithm.register_hook(TimerHook(), "TimerHook", "LOW")
    started(algorithm)
    counter = SyncCounter()
    one_step(algorithm, counter)
    assert counter.count >= 4 and len(waits) == 2
    usb.use_fast_hooks(algorithm)
    waits.clear()
    del algorithm.start_run, algorithm.end_run
    one_step(started(algorithm))
    assert not waits and {"lr", "train/prefetch_time", "train/run_time"} <= set(algorithm.log_dict)
    assert algorithm.log_dict["train/prefetch_time"] >= 0 and 0 < algorithm.log_dict["train/run_time"] < 60


def test_average_equals_usbs_and_keeps_every_address():
    torch.manual_seed(0)
    model = TinyNet(K)
    theirs_model, ours_model = TinyNet(K), TinyNet(K)
    ours, theirs = usb.AveragedModel(model, ours_model, 0.9), USBEMA(model, 0.9)
    ours.register(), theirs.register()
    addresses = [p.data_ptr() for p in (*model.parameters(), *ours_model.parameters(), *ours_model.buffers())]
    for _ in range(5):
        model(torch.randn(4, 3, 8, 8))  # moves BatchNorm's buffers
        for p in model.parameters():
            p.data += torch.randn_like(p)
        ours.update(), theirs.update()
        theirs_model.load_state_dict(model.state_dict())
        theirs_model.load_state_dict(theirs.shadow, strict=False)
        for name, value in ours_model.state_dict().items():
            torch.testing.assert_close(value, theirs_model.state_dict()[name])
        assert ours.shadow.keys() == theirs.shadow.keys()
    online = copy.deepcopy(model.state_dict())
    ours.apply_shadow()
    for name, p in model.named_parameters():
        assert torch.equal(p, ours.shadow[name]) and not torch.equal(p, online[name])
    ours.restore()
    assert all(torch.equal(value, online[name]) for name, value in model.state_dict().items())
    assert addresses == [p.data_ptr() for p in (*model.parameters(), *ours_model.parameters(), *ours_model.buffers())]
    other = TinyNet(K)
    ours.load(other)
    assert all(torch.equal(a, b) for a, b in zip(ours_model.parameters(), other.parameters()))


def test_bacon_adds_its_loss_and_keeps_its_bank(tmp_path):
    algorithm = build(tmp_path, usb.FixMatch, usb.BaCon, bacon_start=0.001, bacon_loss_ratio=0.5, **LONG)
    with torch.no_grad():  # confident predictions, so that rows are reliable
        algorithm.network.aux_classifier.weight *= 400
    started(algorithm)
    for step in range(4):
        before = copy.deepcopy(algorithm.bacon)
        projection = copy.deepcopy(algorithm.network.projection)
        seen = {}
        handle = algorithm.bacon.register_forward_pre_hook(lambda _, args, seen=seen: seen.update(enumerate(args)))
        batch, loss = one_step(algorithm)
        handle.remove()
        log = algorithm.log_dict
        total = log["train/total_loss"] + log["train/abc_loss"] + 0.5 * log["train/bacon_loss"]
        torch.testing.assert_close(loss, total)
        # The same step by a module of its own gives the same loss, bank and centers.
        assert seen[0].shape == (18, 32)
        reference = before(
            seen[0].detach(), batch["y_lb"], seen[2], batch["idx_lb"], batch["idx_ulb"],
            progress=step / 1000, active=step > 1,
        )  # fmt: skip
        torch.testing.assert_close(log["train/bacon_loss"], reference.loss)
        for name, value in before.bank.state_dict().items():
            assert torch.equal(algorithm.bacon.bank.state_dict()[name], value), name
        moved = not torch.equal(algorithm.network.projection.weight, projection.weight)
        assert moved == (step > 1)
    assert log["train/bacon_loss"] > 0 and 0 < log["train/bacon_bank_fill"] < 1
    assert algorithm.bacon.bank.selected_label[batch["idx_lb"]].tolist() == batch["y_lb"].tolist()


def test_checkpoint_holds_the_bank_and_resumes(tmp_path):
    first = build(tmp_path, usb.FixMatch, usb.BaCon)
    first.train()
    path = tmp_path / "run" / "latest_model.pth"
    assert set(torch.load(path, weights_only=True)) >= {"model", "ema_model", "optimizer", "bacon"}
    second = build(tmp_path, usb.FixMatch, usb.BaCon, resume=True, num_train_iter=12, seed=1)
    second.load_model(str(path))
    expected, found = first.get_save_dict(), second.get_save_dict()
    for key in ("model", "ema_model", "bacon"):
        assert all(torch.equal(value, found[key][name]) for name, value in expected[key].items()), key
    second.call_hook("before_run")  # with resume the average goes on from the checkpoint
    assert all(torch.equal(value, second.ema_model.state_dict()[k]) for k, value in expected["ema_model"].items())
    # A checkpoint of ABC is refused by what it lacks.
    abc = build(tmp_path / "abc", usb.FixMatch, usb.ABC)
    abc.train()
    with pytest.raises(RuntimeError, match=r"Missing key.*projection\.weight"):
        second.load_model(str(tmp_path / "abc" / "run" / "latest_model.pth"))


def test_abc_refuses_a_class_without_labeled_images(tmp_path, monkeypatch):
    def without_seven():
        parts = toy_datasets()
        parts["train_lb"].targets = [0 if y == 7 else y for y in parts["train_lb"].targets]
        return parts

    monkeypatch.setattr("semilearn.core.algorithmbase.get_dataset", lambda *_: without_seven())
    with pytest.raises(ValueError, match="class 7 has no labeled image"):
        build(tmp_path, usb.FixMatch, usb.ABC)


def test_layer_wise_learning_rates_see_every_layer(tmp_path):
    algorithm = build(tmp_path, usb.FixMatch, usb.BaCon, layer_decay=0.5)
    trained = {id(p) for group in algorithm.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in algorithm.model.parameters()}
    assert len({group["lr"] for group in algorithm.optimizer.param_groups}) == 3


def test_command_line_trains_resumes_and_refuses_a_taken_directory(tmp_path, capsys):
    def write(**changes):
        path = tmp_path / "config.yaml"
        values = config(tmp_path, imb_algorithm="bacon", **changes)
        path.write_text("".join(f"{key}: {'null' if value is None else value}\n" for key, value in values.items()))
        return ["--c", str(path)]

    results = main(write())
    assert 0 <= results["eval/best_acc"] <= 1 and "eval/best_acc:" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="run exists"):
        main(write())
    latest = tmp_path / "run" / "latest_model.pth"
    main(write(resume=True, load_path=str(latest), num_train_iter=12, epoch=3))
    # USB's last save comes after its counter was advanced, and adds one more.
    assert torch.load(latest, weights_only=True)["it"] == 13
    with pytest.raises(SystemExit, match="load_path: expected the checkpoint"):
        main(write(resume=True, load_path=str(tmp_path / "none.pth")))
    with pytest.raises(SystemExit, match=r"algorithm: expected one of .*fixmatch.*found 'fixmtach'"):
        main(write(algorithm="fixmtach"))
    with pytest.raises(SystemExit, match="pseudolabel needs a CUDA device"):
        arguments = write(algorithm="pseudolabel", save_name="other")
        text = (tmp_path / "config.yaml").read_text().replace("imb_algorithm: bacon", "imb_algorithm: null")
        (tmp_path / "config.yaml").write_text(text + "unsup_warm_up: 0.4\n")
        main(arguments)


def test_a_shipped_configuration_runs_unedited_and_again(tmp_path, capsys):
    """The keys of USB's config/classic_cv_imb/fixmatch_abc files that name devices and checkpoints."""
    latest = tmp_path / "run" / "latest_model.pth"
    shipped = {
        "resume": True,
        "load_path": str(latest),
        "overwrite": True,
        "use_tensorboard": True,
        "world_size": 1,
        "rank": 0,
        "multiprocessing_distributed": True,
        "dist_url": "tcp://127.0.0.1:10169",
        "dist_backend": "nccl",
        "gpu": "None",
        "amp": False,
        "clip": 0.0,
    }
    path = tmp_path / "config.yaml"

    def run(**changes):
        values = config(tmp_path, imb_algorithm="abc", abc_p_cutoff=0.95, abc_loss_ratio=1.0, **(shipped | changes))
        path.write_text("".join(f"{key}: {value}\n" for key, value in values.items()))
        main(["--c", str(path)])
        return torch.load(latest, weights_only=True)["it"], capsys.readouterr().out

    (tmp_path / "run").mkdir()  # stopped before its first checkpoint
    steps, shown = run()
    assert steps == 9 and f"no checkpoint {latest} yet: starting at the beginning" in shown
    steps, shown = run(num_train_iter=12, epoch=3)
    assert steps == 13 and "no checkpoint" not in shown
    with pytest.raises(SystemExit, match="load_path: expected the checkpoint"):
        run(load_path=str(tmp_path / "mistyped.pth"))


@pytest.mark.skipif(not MISSING_TRACKERS, reason="aim and wandb are installed")
def test_a_tracker_that_is_not_installed_is_named(tmp_path):
    name = MISSING_TRACKERS[0]
    path = tmp_path / "config.yaml"
    path.write_text(f"algorithm: fixmatch\nuse_{name}: True\n")
    with pytest.raises(SystemExit, match=f"use_{name}: {name} is not installed"):
        main(["--c", str(path)])
    with pytest.raises(ImportError):
        __import__(name)
