"""Trainings whose weights, gradients and optimiser state are divided among the devices: `trainer=fsdp`."""

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.optim import Optimizer

from src.training.divided import divided, whole

NAME = "sharded"


class ShardedStrategy(DDPStrategy):
    """Fully sharded data parallel (Zhao et al. 2023, arXiv:2304.11277), by `torch.distributed.fsdp.fully_shard`.

    Each device keeps its part of every weight. The weights of a block are gathered while it is computed. Lightning's
    own strategies do not run on the CPU, or write a checkpoint for each device; here checkpoints hold whole tensors, as
    in any other training, and can be continued with another number of devices.
    """

    def model_to_device(self) -> None:
        """Divides the weights, and moves them to the devices."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            mesh = init_device_mesh(self.root_device.type, (self.world_size,))
            network = self.lightning_module.denoiser.network
            for block in blocks_of(network):
                fully_shard(block, mesh=mesh)
            fully_shard(network, mesh=mesh)
        super().model_to_device()

    def configure_ddp(self) -> None:
        """Nothing is wrapped: the network itself reduces its gradients."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return whole(super().lightning_module_state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return whole(super().optimizer_state(optimizer))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, stored in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: {name: divided(value, parameters[number]) for name, value in values.items()}
                for number, values in stored["state"].items()
            }
            optimizer.load_state_dict({**stored, "state": state})


StrategyRegistry.register(NAME, ShardedStrategy, description="weights divided among the devices")


def blocks_of(network: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a network: the entries of its lists of modules that have parameters and can be called."""
    for part in network.modules():
        if isinstance(part, nn.ModuleList):
            for block in part:
                callable_ = type(block).forward is not nn.Module.forward
                if (
                    callable_
                    and not isinstance(block, nn.ModuleList)
                    and any(True for _ in block.parameters())
                ):
                    yield block
