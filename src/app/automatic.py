"""Options with the value `auto`: what this device makes of them, before anything else reads the configuration."""

from pathlib import Path

import torch
from omegaconf import DictConfig

from src.app.build import class_of
from src.diffusion.loss import MeanFlowLoss

CPU_INFO = Path("/proc/cpuinfo")
LONG = 2000
"""Steps from which on compiling pays on a GPU: it takes about a minute."""
LONG_BUDGET = 600.0
"""The same for a budget, in seconds."""


def settle(config: DictConfig) -> list[str]:
    """Replaces `trainer.precision=auto` and `compile=auto` by this device's choice.

    Runs store the choice, so a training that is resumed on another machine keeps it.

    Args:
        config: conf/train.yaml, composed; changed in place.

    Returns:
        For each option that was auto, a line that says what was chosen and why.
    """
    device = device_of(config)
    lines = []
    if config.trainer.get("precision") == "auto":
        config.trainer.precision, why = precision_of(device)
        lines.append(f"precision   {config.trainer.precision}: {why}")
    if config.compile == "auto":
        if issubclass(class_of(config.get("loss")) or object, MeanFlowLoss):
            config.compile, why = False, "this loss takes a forward-mode derivative"
        elif config.get("regularizer"):
            config.compile, why = False, "regularizer reads hidden activations"
        elif config.trainer.get("strategy") == "sharded":
            config.compile, why = False, "trainer=fsdp does not support it"
        else:
            config.compile, why = compile_of(device, config.trainer.max_steps, config.get("budget"))
        lines.append(f"compile     {str(config.compile).lower()}: {why}")
    return lines


def device_of(config: DictConfig) -> str:
    """The type of the device on which Lightning will train: cpu, cuda or another accelerator's."""
    chosen = config.trainer.get("accelerator")
    if chosen == "cpu":
        return "cpu"
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type


def precision_of(device: str) -> tuple[str, str]:
    """The precision for a device, as Lightning names it, and the reason."""
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16-mixed", "this GPU has bfloat16"
        return "32-true", "this GPU has no bfloat16"
    if device != "cpu":
        return "32-true", f"mixed precision has not been tested on {device}"
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("amx_bf16"):
        return "bf16-mixed", "this CPU multiplies matrices of bfloat16 (AMX)"
    if not capabilities.get("avx512_bf16"):
        return "32-true", "this CPU has no bfloat16 instructions"
    if vendor() == "AuthenticAMD":
        return "bf16-mixed", "this CPU has bfloat16 instructions (avx512_bf16) of twice float32's rate"
    return (
        "32-true",
        "this CPU's bfloat16 instructions (avx512_bf16 without AMX) are no faster than float32's",
    )


def compile_of(device: str, max_steps: int, budget: float | None = None) -> tuple[bool, str]:
    """Whether to compile for a device, and the reason; with a budget of seconds, the steps do not matter."""
    if device == "cpu":
        return False, "on a CPU compiling takes minutes and gains at most 5 %"
    if device != "cuda":
        return False, f"compiling has not been tested on {device}"
    if budget is not None and budget < LONG_BUDGET:
        return False, f"{budget:g} s are over before compiling pays (from {LONG_BUDGET:g} s)"
    if budget is None and max_steps < LONG:
        return False, f"{max_steps:,} steps are over before compiling pays (from {LONG:,})"
    return True, "on a GPU it pays after the first minutes"


def vendor() -> str:
    """The CPU's vendor as it names itself, e.g. AuthenticAMD; empty where the system does not say."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
