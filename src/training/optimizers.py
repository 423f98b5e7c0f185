"""Optimisers that are made of several, or of another package: Muon with AdamW, and schedule-free AdamW."""

from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer


class Joined(Optimizer):
    """Several optimisers of different parameters as one: groups, states and steps are theirs.

    The learning rate of each group is read at every step, so that schedules act as usual.

    Args:
        parts: the optimisers, at least one.

    Attributes:
        counters: options of the groups that count steps, which a change of options does not reset.
    """

    counters: tuple[str, ...] = ()

    def __init__(self, parts: Sequence[Optimizer]):
        self.parts = list(parts)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Lets the parts work on the groups and states of the whole."""
        first = 0
        for part in self.parts:
            last = first + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[first:last], self.state
            first = last

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of each part. Without any gradient, which is how a step is skipped, nothing changes."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(p.grad is not None for group in self.param_groups for p in group["params"]):
            for part in self.parts:
                part.step()
        return loss


class MuonAdamW(Joined):
    """Muon (Jordan et al. 2024) for matrices, AdamW for all other parameters, e.g. convolutions and biases.

    Updates of matrices are scaled to the root mean square of AdamW's (Liu et al. 2025, arXiv:2502.16982, sec. 2.2), so
    both have one learning rate. Muon is torch's; its orthogonalisation is computed in bfloat16.

    Args:
        params: the parameters.
        lr: learning rate.
        momentum: of Muon, in [0, 1).
        betas, eps: of AdamW.
        weight_decay: decoupled, of both.

    Raises:
        ValueError: this version of torch has no Muon, or an argument is out of range.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        muon = getattr(torch.optim, "Muon", None)
        if muon is None:
            raise ValueError(
                f"Muon needs torch 2.9 or newer, and this is {torch.__version__}: choose optimizer=adamw"
            )
        params = list(params)
        matrices = [p for p in params if p.dim() == 2]
        others = [p for p in params if p.dim() != 2]
        parts: list[Optimizer] = []
        if matrices:
            parts.append(
                muon(
                    matrices,
                    lr=lr,
                    momentum=momentum,
                    weight_decay=weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if others:
            parts.append(AdamW(others, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True))
        super().__init__(parts)


class ScheduleFreeAdamW(Joined):
    """AdamW without a schedule (Defazio et al. 2024, arXiv:2405.15682), of the package schedulefree.

    The network holds y, where gradients are taken. What is sampled and scored is the average x, which
    `ema=schedule_free` computes from y and the optimiser's state, so that the optimiser never changes its mode.

    Args:
        params: the parameters.
        lr: learning rate; there is no decay.
        betas: the first is the share of x in y, the second is Adam's.
        eps: of Adam.
        weight_decay: decoupled, at y.
        warmup_steps: steps of linear warm-up, over which the average is weighted, too.

    Raises:
        ValueError: the package is missing.
    """

    counters = ("k", "weight_sum", "lr_max", "scheduled_lr", "train_mode")

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
    ):
        if find_spec("schedulefree") is None:
            raise ValueError(
                "schedule_free needs the package schedulefree: pip install -e '.[schedulefree]', or choose"
                " optimizer=adamw"
            )
        from schedulefree import AdamWScheduleFree

        inner = AdamWScheduleFree(
            list(params),
            lr=lr,
            betas=tuple(betas),
            eps=eps,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
        )
        inner.train()
        super().__init__([inner])

    @torch.no_grad()
    def averages(self) -> dict[nn.Parameter, Tensor]:
        """x by parameter: y + (1 - 1/beta_1) (z - y), since y = (1 - beta_1) z + beta_1 x (eq. 11)."""
        found = {}
        for group in self.param_groups:
            share = 1 - 1 / group["betas"][0]
            for p in group["params"]:
                z = self.state[p].get("z") if p in self.state else None
                found[p] = p.clone() if z is None else p.lerp(z.to(p.dtype), share)
        return found
