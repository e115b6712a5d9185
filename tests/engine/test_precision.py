"""The network's arithmetic by name, and what "auto" means."""

from pathlib import Path

import pytest
import torch

from bacon_fast.engine.build import resolve_precision
from bacon_fast.engine.presets import PRESETS
from bacon_fast.engine.trainer import Trainer

CPU = torch.device("cpu")


def flags():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next(line for line in lines if line.startswith("flags")).split(":")[1].split())


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo to compare with")
def test_auto_is_bf16_where_the_processor_has_it():
    expected = "bf16" if flags() & {"avx512_bf16", "amx_bf16"} else "fp32"
    assert resolve_precision("auto", CPU) == expected


@pytest.mark.parametrize("capabilities", [{"avx512_bf16": True}, {"amx_bf16": True}])
def test_auto_follows_the_capabilities(monkeypatch, capabilities):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_precision("auto", CPU) == "bf16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(capabilities, False))
    assert resolve_precision("auto", CPU) == "fp32"


@pytest.mark.parametrize("major", [7, 8])
def test_auto_on_a_gpu(monkeypatch, major):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    assert resolve_precision("auto", torch.device("cuda")) == ("bf16" if major == 8 else "fp32")


def test_names_stay_and_tf32_needs_a_gpu():
    assert [resolve_precision(n, CPU) for n in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]
    with pytest.raises(ValueError, match="precision: tf32 needs a CUDA device, found cpu"):
        resolve_precision("tf32", CPU)


def test_the_run_records_what_auto_was(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    config = PRESETS["digits"].config().replace(run_dir=tmp_path / "run", precision="auto", threads=1)
    trainer = Trainer(config)
    trainer.logger.close()
    assert trainer.config.engine.precision == "bf16"
    assert '"precision": "bf16"' in (tmp_path / "run/config.json").read_text()
    features = []
    trainer.method.network.head.register_forward_hook(lambda module, inputs, output: features.append(output.dtype))
    trainer.train_step()
    assert features == [torch.bfloat16]


def test_auto_agrees_with_what_a_run_recorded_and_a_name_does_not():
    auto = PRESETS["digits"].config()
    assert auto.engine.precision == "auto"
    recorded = auto.replace(precision="bf16")
    assert auto.differences(recorded) == []
    named = auto.replace(precision="fp32")
    assert named.differences(recorded) == ["precision: checkpoint 'bf16', now 'fp32'"]
