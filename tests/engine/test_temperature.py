"""Temperature scaling: the least log-loss by scipy, and what a run keeps, says and uses of it."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from run_cases import final_state, tiny
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from bacon_fast.engine.checkpoint import list_checkpoints
from bacon_fast.engine.temperature import RANGE, fit_temperature
from bacon_fast.engine.trainer import Trainer
from bacon_fast.files import read_record
from bacon_fast.run import open_run


def by_scipy(logits, labels) -> float:
    """The temperature of the least mean log-loss, by bounded search over its logarithm."""
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)

    def loss(log_t):
        return -log_softmax(logits / math.exp(log_t), axis=1)[np.arange(len(labels)), labels].mean()

    return math.exp(minimize_scalar(loss, bounds=np.log(RANGE), method="bounded", options={"xatol": 1e-9}).x)


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("count", [12, 500])
def test_it_is_scipys_whether_the_network_is_too_sure_or_not_sure_enough(scale, count):
    generator = np.random.default_rng(count)
    logits = generator.normal(0, 2, (count, 7))
    labels = [generator.choice(7, p=p) for p in softmax(logits, axis=1)]  # right at T = 1, so T is about the scale
    found = fit_temperature(torch.tensor(scale * logits, dtype=torch.float32), torch.tensor(labels))
    assert found == pytest.approx(by_scipy(scale * logits, labels), rel=2e-3)


def test_the_ends_of_the_range():
    right = torch.tensor([[5.0, 0.0], [0.0, 5.0]])
    assert fit_temperature(right, torch.tensor([1, 0])) == pytest.approx(RANGE[1])  # always wrong
    assert fit_temperature(right, torch.tensor([0, 1])) is None  # the surer the better, without end
    assert fit_temperature(right / 0, torch.tensor([1, 0])) is None


def expected_error(probabilities, labels) -> float:
    """Expected calibration error in 15 bins, a loop."""
    confidence, predicted = probabilities.max(1), probabilities.argmax(1)
    total = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if inside.any():
            total += inside.mean() * abs((predicted == labels)[inside].mean() - confidence[inside].mean())
    return total


@pytest.fixture(scope="module", params=["last", "validation"])
def finished(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("temperature") / "run"
    changes = {"validation": 0.3, "select": request.param, "ema": 0.0, "lr": 0.1, "bn_momentum": 0.5, "eval_every": 2}
    trainer = Trainer(tiny(folder, method="fixmatch+abc", **changes))
    return trainer, trainer.fit()


def test_a_run_keeps_the_temperature_of_the_weights_that_it_uses(finished):
    trainer, summary = finished
    run = open_run(trainer.run_dir, "cpu")
    dataset, held_out = trainer.dataset, torch.as_tensor(trainer.split.validation)
    network, normalize = run.network, run.normalize

    def logits(images):
        return network.predict(normalize.normalize(normalize.center(images)))[1].numpy()

    expected = by_scipy(logits(dataset.train_images[held_out]), dataset.train_labels[held_out])
    assert run.temperature == pytest.approx(expected, rel=2e-3)
    assert final_state(trainer.run_dir)["inference"]["temperature"] == run.temperature != 1.0

    tests, labels = logits(dataset.test_images), dataset.test_labels.numpy()
    before = expected_error(softmax(tests, axis=1), labels)
    after = expected_error(softmax(tests / run.temperature, axis=1), labels)
    assert summary["calibration_error"] == pytest.approx(before, abs=1e-5)
    assert summary["scaled_calibration_error"] == pytest.approx(after, abs=1e-5)
    assert summary["calibration"] == (
        f"temperature {run.temperature:.2f}, of {len(held_out)} validation images: expected calibration error "
        f"{100 * before:.1f} % before, {100 * after:.1f} % after, on test"
    )
    assert read_record(trainer.run_dir / "summary.json")["validation"]["temperature"] == run.temperature
    again = run.evaluate()
    assert again["temperature"] == run.temperature
    assert again["scaled_calibration_error"] == pytest.approx(after, abs=1e-5)


def test_predictions_are_scaled(finished, tmp_path):
    trainer, _ = finished
    run = open_run(trainer.run_dir, "cpu")
    image = trainer.dataset.test_images[:1]
    Image.fromarray(image[0].numpy()).save(tmp_path / "one.png")
    logits = run.network.predict(run.normalize.normalize(image))[1].numpy()
    (found,) = run.predict([tmp_path / "one.png"])
    assert found["probability"] == pytest.approx(softmax(logits / run.temperature).max(), abs=1e-6)


def test_without_validation_it_says_uncalibrated(tmp_path):
    trainer = Trainer(tiny(tmp_path / "run", steps=2, method="supervised"))
    summary = trainer.fit()
    run = open_run(tmp_path / "run", "cpu")
    assert run.temperature is None and run.evaluate()["temperature"] is None
    assert "scaled_calibration_error" not in summary
    assert summary["calibration"] == (
        f"uncalibrated: expected calibration error {100 * summary['calibration_error']:.1f} % on test"
    )


def test_weights_of_a_step_without_an_evaluation_have_none(tmp_path):
    changes = {"validation": 0.3, "checkpoint_every": 3, "eval_every": 2, "steps": 4, "method": "supervised"}
    Trainer(tiny(tmp_path / "run", **changes)).fit()
    states = [torch.load(path, weights_only=True) for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    temperatures = {state["step"]: state["inference"]["temperature"] for state in states}
    assert temperatures[3] is None and temperatures[4] > 0
