"""What `auto` becomes on each kind of device."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from src.app import automatic, jobs
from src.app.assemble import assemble
from src.app.automatic import compile_of, precision_of, settle
from src.app.options import CONF


@pytest.fixture
def cpu(monkeypatch):
    """Pretends that this is a CPU of this vendor with these instructions."""

    def pretend(vendor, *instructions):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(instructions, True))
        monkeypatch.setattr(automatic, "vendor", lambda: vendor)

    return pretend


@pytest.mark.parametrize(
    ("vendor", "instructions", "precision", "reason"),
    [
        ("AuthenticAMD", ["avx512_bf16"], "bf16-mixed", "twice"),
        ("GenuineIntel", ["avx512_bf16", "amx_bf16"], "bf16-mixed", "AMX"),
        ("GenuineIntel", ["avx512_bf16"], "32-true", "no faster"),
        ("AuthenticAMD", ["avx2"], "32-true", "no bfloat16"),
        ("", [], "32-true", "no bfloat16"),
    ],
)
def test_precision_on_cpus(cpu, vendor, instructions, precision, reason):
    cpu(vendor, *instructions)
    chosen, why = precision_of("cpu")
    assert chosen == precision
    assert reason in why


@pytest.mark.parametrize("has", [True, False])
def test_precision_on_gpus(monkeypatch, has):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    assert precision_of("cuda")[0] == ("bf16-mixed" if has else "32-true")
    assert precision_of("mps")[0] == "32-true"


def test_compiling():
    assert [compile_of(device, 10_000)[0] for device in ("cpu", "cuda", "mps")] == [False, True, False]
    assert not compile_of("cuda", 100)[0]


@pytest.mark.parametrize(("budget", "compiled"), [(60.0, False), (3600.0, True)])
def test_with_a_budget_the_probe_and_the_training_choose_alike(budget, compiled):
    assert [compile_of("cuda", steps, budget)[0] for steps in (100, 3000)] == [compiled, compiled]


def test_auto_does_not_compile_what_compiling_does_not_support(monkeypatch):
    monkeypatch.setattr(automatic, "device_of", lambda config: "cuda")
    trainer = {"max_steps": 10_000}
    chosen = {
        "plain": {},
        "sharded": {"trainer": trainer | {"strategy": "sharded"}},
        "derivative": {"loss": {"_target_": "src.diffusion.loss.MeanFlowLoss"}},
        "regularizer": {"regularizer": {"_target_": "src.training.regularizer.Dispersive"}},
    }
    for name, options in chosen.items():
        config = OmegaConf.create({"trainer": trainer, "compile": "auto", **options})
        settle(config)
        assert config.compile == (name == "plain"), name


def test_choices_replace_auto_and_others_stay(cpu):
    cpu("AuthenticAMD", "avx512_bf16")
    config = OmegaConf.create(
        {"trainer": {"precision": "auto", "accelerator": "cpu", "max_steps": 10}, "compile": "auto"}
    )
    lines = settle(config)
    assert config.trainer.precision == "bf16-mixed"
    assert config.compile is False
    assert [line.split()[:2] for line in lines] == [["precision", "bf16-mixed:"], ["compile", "false:"]]
    assert settle(config) == []


def test_a_training_stores_the_choice_and_prints_the_reason(cpu, tmp_path):
    cpu("AuthenticAMD", "avx512_bf16")
    jobs.register()
    options = [
        "trainer.precision=auto",
        "compile=auto",
        "trainer.accelerator=cpu",
        "logger=csv",
        "metrics=none",
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", options)
    experiment = assemble(config, tmp_path)
    assert experiment.trainer.precision == config.trainer.precision == "bf16-mixed"
    assert "precision   bf16-mixed: this CPU has bfloat16" in experiment.summary
    assert "compile     false: " in experiment.summary
