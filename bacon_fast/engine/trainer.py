"""The training loop: one static-shape step, evaluations, checkpoints, and the files of a run."""

import copy
import dataclasses
import functools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

import bacon_fast
from bacon_fast.data.datasets import ImageDataset
from bacon_fast.data.longtail import pool_line
from bacon_fast.engine import build, distributed
from bacon_fast.engine.batches import Batches, build_augment
from bacon_fast.engine.checkpoint import (
    CheckpointError,
    content_of,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    set_aside_after,
)
from bacon_fast.engine.config import Config
from bacon_fast.engine.diagnostics import Diagnostics
from bacon_fast.engine.directory import newest_state
from bacon_fast.engine.ema import EMA
from bacon_fast.engine.evaluation import (
    Evaluation,
    Part,
    calibration_bins,
    calibration_error,
    evaluate,
    parts_of,
    predict_together,
)
from bacon_fast.engine.features import FeatureBatches, Features, load_features
from bacon_fast.engine.finite import not_finite
from bacon_fast.engine.graph import CudaCapture, GraphedStep, use_graph
from bacon_fast.engine.interrupt import StopRequest
from bacon_fast.engine.lock import DirectoryLock
from bacon_fast.engine.logger import Progress, RowHook, Rows, RunLogger
from bacon_fast.engine.meter import Meter
from bacon_fast.engine.metrics import History, compute_metrics, standard_error
from bacon_fast.engine.parallel import PhaseParallel
from bacon_fast.engine.schedule import learning_rate
from bacon_fast.engine.selection import LOSS, KeptWeights, best_row, is_out_of_patience, require_validation
from bacon_fast.engine.step import AUTOCAST, TrainStep, autocast
from bacon_fast.engine.summary import summarize
from bacon_fast.engine.temperature import fit_temperature
from bacon_fast.files import remove_leftovers, write_record
from bacon_fast.methods.method import Method, NewGeneration, RefreshContext
from bacon_fast.methods.part import DataInfo
from bacon_fast.models.batchnorm import synchronize
from bacon_fast.models.weights import find_weights

_PLACES = ("data_dir", "unlabeled", "test", "val")  # may differ from machine to machine


class DivergedError(RuntimeError):
    """The loss, or a tensor that the run would save, is no longer finite."""


class StoppedError(RuntimeError):
    """A signal asked to stop, and the state is saved. Attribute `signum` is the signal."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


def refuse_used_run_dir(run_dir: Path) -> None:
    """Raises ValueError when `run_dir` holds a run."""
    if (run_dir / "config.json").exists():
        raise ValueError(f"run_dir: {run_dir} holds a run already; add --resume, or name another directory")


class Trainer:
    """A run: everything it needs is built, or restored from `config.run.run_dir`, in the constructor.

    Inside `distributed.process_group` every rank builds one and calls the same methods in the same order. Their state
    is the same on all ranks, but for BatchNorm's running statistics without `sync_batchnorm`. Only rank 0 writes files.

    The run directory is locked until `fit` ends or `logger.close()`. When the constructor fails, it leaves no directory
    that it made.

    Args:
        config: of the run.
        dataset: the one that `config` names, if it is loaded already.
        progress, name: a display that this run shares with others, and the run's name there.
        on_row: called on rank 0 with each row of the log; see `RunLogger`.

    Raises:
        ValueError: a wrong setting, a split that does not fit the data, or a run directory that holds another run or
            that another command uses.
        CheckpointError: `config.run.resume` is set and there is nothing to resume, or its configuration differs.
    """

    def __init__(
        self,
        config: Config,
        *,
        dataset: ImageDataset | None = None,
        progress: Progress | None = None,
        name: str = "",
        on_row: RowHook | None = None,
    ) -> None:
        if config.run.run_dir is None:
            raise ValueError("run_dir: expected a directory, found None")
        self.device = build.resolve_device(config.run.device)
        config = config.replace(precision=build.resolve_precision(config.engine.precision, self.device))
        self.config, self.run_dir = config, Path(config.run.run_dir)
        build.check_backend(config, self.device)
        self._uses_graph = use_graph(config.engine.graph, self.device)
        # A graph is captured on a stream of its own, and runs that share a GPU run beside each other.
        alone = self.device.type == "cuda" and distributed.num_ranks() == 1
        self.stream = torch.cuda.Stream(self.device) if alone else None
        distributed.own_part(config.views.batch_size)  # refuses a batch that does not divide among the ranks
        distributed.require_equal({k: v for k, v in config.flat().items() if k not in _PLACES})
        self._lock: DirectoryLock | None = None  # rank 0's, on the run directory
        try:
            self._open(dataset, progress, name, on_row)
        except BaseException:
            if self._lock is not None:
                self._lock.release()
            raise

    # --- construction ----------------------------------------------------------------------------------------------

    def _open(self, dataset: ImageDataset | None, progress: Progress | None, name: str, on_row: RowHook | None) -> None:
        """Builds or restores the run, and its files on rank 0."""
        build.use_threads(self.config.engine.threads)
        saved = self._saved_state()
        config = self.config
        torch.backends.cudnn.allow_tf32 = config.engine.precision == "tf32"
        torch.set_float32_matmul_precision("highest")  # the losses' similarities are products of matrices
        torch.backends.cudnn.benchmark = self.device.type == "cuda"  # shapes never change: time each convolution once

        # A checkpoint that does not say it is of a version that knew one way only.
        self.interpolation = build.interpolation(config)
        if saved:
            with content_of(saved[0]):
                self.interpolation = saved[1]["inference"].get("interpolation", "bilinear")
        load_dataset = functools.partial(build.build_dataset, config, self.device, self.interpolation)
        writes_files = config.data.download or (config.data.dataset == "folder" and config.data.images != "memory")
        if dataset is None:
            dataset = distributed.leader_first(load_dataset) if writes_files else load_dataset()
        self.dataset = build.normalized_for(config, dataset)
        held_out_by_itself = config.data.validation is None
        self.config = config = config.replace(validation=build.settle_validation(config, self.dataset))
        split_file = self.run_dir / "split.json"
        own_split = config.run.resume and split_file.exists()  # also of a run that has no checkpoint yet
        self.split = build.build_split(config, self.dataset, split_file if own_split else None)
        distributed.require_equal({"split": self.split.hash})
        self.parts = parts_of(self.dataset, self.split)
        validation = sum(len(part.labels) for part in self.parts if part.name == "validation")
        require_validation(config.log.select, config.log.patience, validation)
        self._weights: dict | None = None  # where the backbone's came from
        self._features: Features | None = None
        self._build(saved)
        self.step, self.generation, self.train_seconds = 0, 0, 0.0
        self._window: tuple[int, float] | None = None  # the step and the time at which it began
        self._evaluation_seconds = 0.0  # of the last one; not known before the first
        self.history, rows = History(), []
        self.kept = KeptWeights()
        if saved:
            path, state = saved
            with content_of(path):
                rows = self._restore(state)
        if not distributed.is_main():
            self.logger = Rows(rows)
            return
        if not (saved and split_file.exists()):
            self.split.save(split_file)
        self.logger = RunLogger(self.run_dir, config.steps, self.step, rows, progress, name, self._lock, on_row)
        config.write(self.run_dir / "config.json")
        if not saved:
            self.logger.say(pool_line(self.split, self.dataset))
            if held_out_by_itself and config.data.validation:
                self.logger.say(
                    f"validation: {config.data.validation} of the labels of each class are held out, as there are at "
                    f"least {build.ENOUGH_LABELS}; --validation 0 trains on all"
                )
            if self._weights is not None:
                self.logger.say(build.weights_line(self._weights, self.method))
            if self._features is not None:
                count = config.views.cached_views
                kind = f"{count}+{count} fixed augmentations of each image, not fresh ones"
                self.logger.say(f"features {self._features.file}: {kind}")

    def _saved_state(self) -> tuple[Path, dict] | None:
        """Checkpoint to resume from, and its content: rank 0 chooses the file, every rank reads it."""
        state = None

        def choose() -> tuple[Path, int] | None:
            nonlocal state
            path, state = self._newest_state()
            return None if state is None else (path, state["step"])

        chosen = distributed.from_main(choose)
        if self.config.run.resume:  # what the run settled; rank 0 has read it
            self.config = self.config.replace(validation=distributed.from_main(lambda: self.config.data.validation))
        if chosen is None:
            return None
        path, step = chosen
        state = state or load_checkpoint(path)
        if state["step"] != step:
            raise CheckpointError(f"{path} holds step {state['step']} on rank {distributed.rank()}, {step} on rank 0")
        return path, state

    def _newest_state(self) -> tuple[Path, dict | None]:
        """Locks the run directory, and returns the newest checkpoint if the configuration allows to continue from it.

        The state is None for a run that begins.
        """
        folder = self.run_dir / "checkpoints"
        path, state = self.run_dir / "config.json", None
        if self.config.run.resume and not path.exists():
            raise CheckpointError(f"nothing to resume: {self.run_dir} holds no run")
        self._lock = DirectoryLock(self.run_dir, "run_dir")
        remove_leftovers(self.run_dir, folder, self.run_dir / "figures")
        if not self.config.run.resume:
            refuse_used_run_dir(self.run_dir)
            return self.run_dir, None
        if list_checkpoints(folder):
            path, state = newest_state(self.run_dir)
            with content_of(path):
                saved = Config.from_dict(state["config"])
        else:
            saved = Config.read(path)
        self._require_same_run(path, saved)
        if self.config.data.validation is None:
            self.config = self.config.replace(validation=saved.data.validation)
        if state is None:
            print(f"{self.run_dir} holds no checkpoint yet: starting it again from step 0", flush=True)
        else:
            set_aside_after(folder, state["step"])
        return path, state

    def _require_same_run(self, path: Path, saved: Config) -> None:
        """Raises CheckpointError unless `saved`, read from `path`, is this run's configuration, or one of fewer steps
        that this run goes on from: nothing in it may run on t/T, for it would be neither of the two runs.
        """
        own, bound = self.config, self.config.runs_on_length()
        longer = own.steps > saved.steps and not bound
        differences = (own.replace(steps=saved.steps) if longer else own).differences(saved)
        if own.steps != saved.steps and bound:
            differences.append(f"a run of other steps would be another from its start: {', '.join(bound)} run on t/T")
        if differences:
            raise CheckpointError(f"{path} was written by another configuration:\n  " + "\n  ".join(differences))
        if longer:
            print(f"steps: {own.steps} in the place of {saved.steps}; nothing else changes", flush=True)

    def _build(self, saved: tuple[Path, dict] | None) -> None:
        config, split = self.config, self.split
        build.seed_everything(config.seed)
        counts = torch.as_tensor(split.labeled_counts)
        sizes, data = (len(split.labeled), len(split.unlabeled)), self.dataset
        same_imbalance = split.protocol.has_same_imbalance
        self._info = DataInfo(data.num_classes, counts, *sizes, data.mean, data.std, same_imbalance)
        method = self._fresh_method(load_weights=saved is None)
        memory_format = torch.channels_last if config.engine.channels_last else torch.contiguous_format
        self.method = method.to(self.device, memory_format=memory_format)
        if config.engine.sync_batchnorm and distributed.num_ranks() > 1:
            synchronize(self.method)
        half = None if method.mixes_images else AUTOCAST.get(config.engine.precision)
        views = method.unlabeled_views, method.balanced_view, method.labeled_strong_view, half or torch.float32
        inputs = config, split, self.dataset, self.device, *views
        if config.views.cached_views:
            if saved is not None:  # the frozen weights, by which the features are known
                with content_of(saved[0]):
                    self.method.load_state_dict(saved[1]["method"])
            augment, backbone = build_augment(config, data).to(self.device), self.method.network.backbone
            load = functools.partial(load_features, config, data, augment, backbone, self.device)
            self._features = distributed.leader_first(load)
            self.parts = [self._features.part(part, split) for part in self.parts]
            self.batches = FeatureBatches(self._features, *inputs)
        else:
            self.batches = Batches(*inputs)
        bank = None if method.regularizer is None else method.regularizer.bank
        self.diagnostics = Diagnostics(self.dataset.num_classes, bank).to(self.device)
        self.meter = Meter(self.device)
        self._start()
        if not config.views.cached_views:
            method.check_images(self.batches.augment.height, self.batches.augment.width)

    def _fresh_method(self, *, load_weights: bool) -> Method:
        """The method at its start. `load_weights`: with the backbone's weights, which a checkpoint has too."""
        weights = None
        if load_weights and self.config.model.weights != "none":
            model = self.config.model
            weights = distributed.leader_first(lambda: find_weights(model.weights, model.backbone))
            self._weights = weights.info()
        return build.build_method(self.config, self._info, None if weights is None else weights.tensors)

    def _start(self) -> None:
        """Optimizer, average and step for the method's current parameters."""
        config = self.config
        distributed.copy_from_main(self.method)  # initialized from the same seed; this makes sure
        self.optimizer = build.build_optimizer(config, self.method)
        options = config.optimizer
        self.ema = EMA(self.method.network, options.ema, options.ema_buffers, warmup=options.ema_warmup)
        self.method.bind(self.ema.network)
        # Without inductor's own graphs: the whole step is one.
        plain = {"triton.cudagraphs": False}
        forward = torch.compile(self.method, options=plain) if config.engine.compile else self.method
        if distributed.num_ranks() > 1:
            forward = PhaseParallel(forward)
        parts = (self.batches, self.optimizer, self.ema, self.diagnostics, self.meter)
        self.program = TrainStep(config, self.method, forward, *parts)
        self.graphed = None
        if self._uses_graph:
            strict, report = config.engine.graph == "on", lambda text: self.logger.say(text)
            self.graphed = GraphedStep(self.program, CudaCapture(), strict=strict, report=report)

    def _start_generation(self, new: NewGeneration) -> None:
        """Starts again from fresh parameters, on another labeled set (CReST)."""
        self.generation += 1
        build.seed_everything((self.config.seed + self.generation) % 2**64)
        fresh = self._fresh_method(load_weights=True)
        with torch.no_grad():  # the method's own buffers stay, the network's do not
            for own, new_start in zip(self.method.parameters(), fresh.parameters(), strict=True):
                own.copy_(new_start)
        self.method.network.load_state_dict(fresh.network.state_dict())
        self.batches.set_labeled(new.labeled, new.labels)
        self._start()
        self.program.counter.fill_(self.step)

    # --- state -----------------------------------------------------------------------------------------------------

    def state(self) -> dict:
        """All that a resumed run needs. Draws are functions of (seed, step), so there is no generator state."""
        return {
            "config": self.config.to_dict(),
            "bacon_fast": bacon_fast.__version__,
            "step": self.step,
            "train_seconds": self.train_seconds,
            "split": self.split.hash,
            "generation": self.generation,
            "labeled": self.batches.labeled,
            "labels": self.batches.labels,
            "inference": self.inference_info(),
            "method": self.method.state_dict(),
            "ema": self.ema.state_dict(),
            "selected": self.kept.tensors,
            "diagnostics": self.diagnostics.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.program.scaler.state_dict(),
            "meter": self.meter.state_dict(),
            "rows": self.logger.rows,
        }

    def inference_info(self) -> dict:
        """What prediction needs beside the weights."""
        spec, augment = build.network_spec(self.config, self.dataset.num_classes), self.batches.augment
        return {
            "network": dataclasses.asdict(spec),
            "class_names": list(self.dataset.class_names),
            "stored_size": list(augment.source_size),
            "image_size": [augment.height, augment.width],
            "interpolation": self.interpolation,
            "selected_step": self.selected_step,
            "mean": list(self.dataset.mean),
            "std": list(self.dataset.std),
            "temperature": self.temperature,
            "weights": self._weights,
        }

    def _restore(self, state: dict) -> list[dict]:
        if state["split"] != self.split.hash:
            raise CheckpointError(
                f"split.json in {self.run_dir} has hash {self.split.hash}, the checkpoint's run used {state['split']}"
            )
        for name, most in (("step", self.config.steps), ("generation", state["step"]), ("train_seconds", math.inf)):
            if not 0 <= state[name] <= most:
                raise ValueError(f"{name}: expected a number from 0 to {most}, found {state[name]}")
        self._require_rows_of_the_pool(state["labeled"], state["labels"])
        self.method.load_state_dict(state["method"])
        self.ema.load_state_dict(state["ema"])
        self.diagnostics.load_state_dict(state["diagnostics"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.program.scaler.load_state_dict(state["scaler"])
        self.meter.load_state_dict(state["meter"])
        for parameter, kept in self.optimizer.state.items():
            for name, value in kept.items():
                if value.dim() and value.shape != parameter.shape:
                    raise ValueError(f"optimizer: expected {name} {list(parameter.shape)}, found {list(value.shape)}")
        self.kept.restore(state["selected"], self.ema.network, self.method.network)
        if broken := not_finite(self._saved_tensors()):
            raise ValueError(f"not finite: {', '.join(broken[:3])}")
        self._weights = state["inference"]["weights"]
        self.generation = state["generation"]
        self.batches.set_labeled(state["labeled"].to(self.device), state["labels"].to(self.device))
        self.step, self.train_seconds = state["step"], state["train_seconds"]
        self.program.counter.fill_(self.step)
        self.history = History(
            {k: v for k, v in row.items() if k != "kind"} for row in state["rows"] if row["kind"] == "eval"
        )
        return state["rows"]

    def _require_rows_of_the_pool(self, labeled: Tensor, labels: Tensor) -> None:
        """Raises ValueError unless these are rows of the pool, at least one, and a class for each."""
        sizes = {"labeled": (labeled, len(self.batches.pool)), "labels": (labels, self.dataset.num_classes)}
        for name, (values, size) in sizes.items():
            if values.dtype != torch.int64 or values.dim() != 1 or len(values) != len(labels) or not len(values):
                raise ValueError(f"{name}: expected int64 [{len(labels)}], found {values.dtype} {list(values.shape)}")
            if int(values.min()) < 0 or int(values.max()) >= size:
                raise ValueError(f"{name}: expected values in 0..{size - 1}")

    def save(self) -> Path:
        """Writes a checkpoint of the current state."""
        self._share_statistics()
        folder, keep = self.run_dir / "checkpoints", self.config.log.keep_checkpoints
        return distributed.from_main(lambda: save_checkpoint(folder, self.step, self.state(), keep))

    def _share_statistics(self) -> None:
        """Makes what is evaluated and saved the same on all ranks."""
        if not self.config.engine.sync_batchnorm:
            distributed.copy_statistics_from_main(self.method, self.ema)

    # --- one step --------------------------------------------------------------------------------------------------

    def train_step(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One step of the method (engine/step.py). Returns losses and statistics as 0-d tensors, ready on the caller's
        stream; the next step may overwrite them.
        """
        with self.on_stream():
            if self.method.refresh_due(self.step):
                self._refresh()
            result = (self.graphed or self.program)(self.step)
        self.step += 1
        return result

    def _refresh(self) -> None:
        self._share_statistics()
        new = self.method.refresh(self._refresh_context())
        distributed.copy_from_main(self.method, self.ema)  # sums on a device may differ in their last bits
        if self.graphed is not None:
            self.graphed.renew()
        if new is not None:
            self._start_generation(new)

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Inside, CUDA work goes to the run's own stream. It waits for the caller's earlier work, and the caller's
        later work waits for it."""
        caller = None if self.stream is None else torch.cuda.current_stream(self.device)
        if caller == self.stream:
            yield
            return
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            yield
        caller.wait_stream(self.stream)

    def _refresh_context(self) -> RefreshContext:
        batches = self.batches

        def predict_images(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
            with autocast(self.config, self.device):
                return predict_together(network, batches.augment, images, self.device)

        return RefreshContext(
            self.step,
            batches.pool,
            batches.labeled,
            batches.unlabeled,
            batches.labels,
            lambda images: batches.augment.normalize(batches.augment.center(images)),
            predict_images,
        )

    # --- the loop --------------------------------------------------------------------------------------------------

    def fit(self) -> dict:
        """Trains to `config.steps` and returns the summary, also in summary.json. The report is written by the caller.

        The first interrupt or SIGTERM finishes the step, saves a checkpoint and raises StoppedError: on all ranks,
        after the same step, when one of them receives it.

        Raises:
            DivergedError: the loss stopped being finite.
            StoppedError: a signal asked to stop.
        """
        try:
            with StopRequest(self.step) as stop, self.on_stream():
                while not self.ended:
                    self.advance(stop)
            return self.finish()
        finally:
            self.logger.close()

    @property
    def ended(self) -> bool:
        """Whether the run came to its last step, or ran out of patience."""
        return self.step >= self.config.steps or is_out_of_patience(self.history.rows, self.config.log.patience)

    @property
    def selected_step(self) -> int | None:
        """Step of the evaluation whose averaged weights are kept; None if the newest are the ones to use."""
        best = best_row(self.history.rows) if self.config.log.select == "validation" else None
        return None if best is None else self.history.rows[best]["step"]

    @property
    def temperature(self) -> float | None:
        """By which the logits of the weights to use are divided, from the validation images; None if it is not known
        of these weights, as between two evaluations.
        """
        step = self.selected_step or self.step
        return next((row.get("validation_temperature") for row in self.history.rows if row["step"] == step), None)

    def chosen_network(self) -> nn.Module:
        """The averaged network by which the run is reported, in evaluation mode: the best on validation, or the newest.

        Its tensors may be the run's own.
        """
        if not self.kept.tensors:
            return self.ema.network
        chosen = copy.deepcopy(self.ema.network)
        chosen.load_state_dict(self.kept.tensors)
        return chosen

    def advance(self, stop: StopRequest) -> None:
        """One step, and what is due after it: log row, evaluation, checkpoint, stop. Raises what `fit` raises."""
        config = self.config
        if self._window is None:
            self._window = self.step, time.perf_counter()
        self.train_step()
        self.logger.advance()
        last = self.step == config.steps
        evaluating = last or self.step % config.log.eval_every == 0
        saving = last or self.step % config.log.checkpoint_every == 0
        logging = evaluating or saving or self.step % config.log.log_every == 0
        if not (logging or stop.agreed(self.step) is not None):
            return
        self._require_finite()
        if logging:
            self._log_train()
        if evaluating:
            self._evaluate()
        last = self.ended
        saving = saving or last
        # Read once: a signal that comes after this line is answered after the next step.
        signum = None if last else stop.agreed(self.step, now=True)
        if saving or signum is not None:
            path = self.save()
        if signum is not None:
            raise StoppedError(f"stopped at step {self.step}: saved {path}; continue with --resume", signum)

    def _require_finite(self) -> None:
        """Raises DivergedError unless the losses since the last log row and all that a checkpoint holds are finite."""
        steps, finite = self.meter.steps()
        found = []
        if finite < steps:
            found.append(f"the loss is not finite since step {self.step - steps + finite + 1}")
        # The losses are of the parameters before this step's update: a checkpoint must not hold what the update broke.
        if broken := not_finite(self._saved_tensors()):
            names = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
            found.append(f"not finite after step {self.step}: {names}")
        (diverged,) = distributed.all_reduce_max(len(found))
        if not diverged:
            return
        saved = list_checkpoints(self.run_dir / "checkpoints")
        raise DivergedError(
            f"{'; '.join(found) or 'another process diverged'}. "
            f"{f'{saved[-1]} is from before' if saved else 'No checkpoint was saved before'}; "
            "try a smaller --lr, or --precision fp32, in a new run directory"
        )

    def _saved_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the method, its average and the optimizer that a checkpoint holds."""
        yield from self.method.state_dict().items()
        yield from ((f"average of {name}", tensor) for name, tensor in self.ema.state_dict().items())
        yield from ((f"selected {name}", tensor) for name, tensor in self.kept.tensors.items())
        for parameter, state in self.optimizer.state_dict()["state"].items():
            yield from ((f"optimizer's {name} of parameter {parameter}", value) for name, value in state.items())

    def _log_train(self) -> None:
        means = self.meter.read()  # the host waits for the device here, so the time below is of whole steps
        first, started = self._window
        seconds, self._window = time.perf_counter() - started, None
        self.train_seconds += seconds
        known, right = means.pop("stats/pseudo_known", 0.0), means.pop("stats/pseudo_correct", 0.0)
        if known:
            means["stats/pseudo_accuracy"] = right / known
        schedule = self.method.schedule(self.step - 1, self.config.steps)
        options = self.config.optimizer
        rate = learning_rate(options.lr_schedule, options.lr, *schedule, options.warmup)
        row = {"kind": "train", "step": self.step, **means, "lr": rate, "train_seconds": self.train_seconds}
        row["steps_per_second"] = (self.step - first) / seconds
        self.logger.log(row)
        steps, every = self.config.steps, self.config.log.eval_every
        # Those after this step and later ones; the last step has one, whatever its number.
        evaluations = -(-steps // every) - (self.step - 1) // every
        left = (steps - self.step) / row["steps_per_second"] + evaluations * self._evaluation_seconds
        self.logger.show_train(row, left)

    def _evaluate(self) -> None:
        """Logs the averaged network's accuracies on the first part, beside what the validation part says."""
        if not self.parts:
            return
        started = time.perf_counter()
        self._share_statistics()
        found = {part.name: self.evaluation(part) for part in self.parts}
        evaluation = found[self.parts[0].name]
        metrics = compute_metrics(evaluation.confusion, self.split.labeled_counts)
        metrics["calibration_error"] = calibration_error(evaluation.calibration)
        metrics["intra_class_variance"] = float(evaluation.intra_class_variance)
        if "validation" in found:
            metrics |= self._on_validation(found["validation"])
            if (temperature := metrics["validation_temperature"]) is not None:
                bins = calibration_bins(evaluation.logits / temperature, self.parts[0].labels.to(self.device))
                metrics["scaled_calibration_error"] = calibration_error(bins)
        metrics |= self.diagnostics.read()
        if self.method.regularizer is not None:
            metrics["temperatures"] = self.method.regularizer.temperatures(self.step / self.config.steps).tolist()
        if self.generation:
            metrics["generation"] = self.generation
        self._evaluation_seconds = time.perf_counter() - started
        self.history.append(self.step, metrics)
        if self.selected_step == self.step:
            self.kept.keep(self.ema.network, self.method.network)
        row = {"kind": "eval", "step": self.step, **metrics}
        self.logger.log(row)
        self.logger.show_eval(row)

    def _on_validation(self, evaluation: Evaluation) -> dict[str, float | None]:
        """What an evaluation's row says of the validation part. All ranks get rank 0's loss and
        temperature, for they decide and are saved."""
        metrics = compute_metrics(evaluation.confusion, self.split.labeled_counts)
        images = evaluation.confusion.sum(1).tolist()
        labels = next(part.labels for part in self.parts if part.name == "validation")
        found = float(evaluation.log_loss), fit_temperature(evaluation.logits, labels)
        loss, temperature = distributed.broadcast(found)
        return {
            LOSS: loss if math.isfinite(loss) else None,
            "validation_temperature": temperature,
            "validation_bacc": metrics["bacc"],
            "validation_bacc_error": standard_error(metrics["per_class"], images),
            "validation_images": sum(images),
        }

    def evaluation(self, part: Part | None = None, network: nn.Module | None = None) -> Evaluation:
        """A network, the average by default, on a whole part of the data, by default the first; the ranks divide it."""
        part, network = part or self.parts[0], network or self.ema.network
        return evaluate(network, self.batches.augment, part, self.dataset.num_classes, self.device)

    def finish(self) -> dict:
        """Writes and returns the summary of the whole run."""
        run = self.dataset, self.split, self.parts, self.history
        summary = summarize(self.config, *run, self.device, self.step, self.train_seconds)
        if distributed.is_main():
            write_record(self.run_dir / "summary.json", summary)
        return summary
