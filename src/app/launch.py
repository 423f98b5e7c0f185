"""Several processes for one job of sampling or evaluation: `devices=2`."""

import logging
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from omegaconf import DictConfig, OmegaConf

from src.app.environment import redacted
from src.errors import UserError

Job = Callable[[DictConfig], dict[str, float]]


def launch(job: Job, config: DictConfig) -> dict[str, float]:
    """Runs a job in this process, or with `devices` > 1 in as many new ones that share the work.

    The processes meet by torch.distributed: nccl on GPUs, gloo on the CPU. The first one's result is returned; if one
    fails, the others are ended.

    Args:
        job: importable; called with the configuration in each process.
        config: composed, with `device`, `devices` and `trust`.

    Raises:
        UserError: more devices than there are, or what a process raised.
    """
    if config.devices == 1:
        return job(config)
    on_gpus = config.device in ("auto", "cuda") and torch.cuda.is_available()
    if not on_gpus and config.device not in ("auto", "cpu"):
        raise UserError(
            f"device={config.device} devices={config.devices}: several processes need device=auto or cpu"
        )
    if on_gpus and config.devices > torch.cuda.device_count():
        raise UserError(f"devices={config.devices}: this machine has {torch.cuda.device_count()} GPUs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    content = OmegaConf.to_container(config)
    with tempfile.TemporaryDirectory() as exchange:
        threads = max(1, torch.get_num_threads() // config.devices)
        arguments = (job, content, config.devices, address, on_gpus, threads, exchange)
        # it would announce that it ends the other processes
        logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
        try:
            torch.multiprocessing.spawn(_process, arguments, nprocs=config.devices)
        except (torch.multiprocessing.ProcessRaisedException, torch.multiprocessing.ProcessExitedException):
            message = Path(exchange, "error")
            if message.is_file():
                raise UserError(message.read_text()) from None
            raise
        return torch.load(Path(exchange, "scores"), weights_only=True)


def _process(
    rank: int,
    job: Job,
    content: dict[str, Any],
    world_size: int,
    address: str,
    on_gpus: bool,
    threads: int,
    exchange: str,
) -> None:
    from src.app.build import trusting
    from src.app.jobs import Redacting, register

    register()
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(Redacting(logging.Formatter("%(message)s")))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.ERROR, handlers=[handler])
    warnings.filterwarnings("ignore", ".*compute.* method of metric .* was called before .*update.*")
    torch.set_num_threads(threads)
    if on_gpus:
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl" if on_gpus else "gloo", init_method=address, world_size=world_size, rank=rank
    )
    config = OmegaConf.create(content)
    config.device = f"cuda:{rank}" if on_gpus else "cpu"
    try:
        with trusting(config.trust):
            scores = job(config)
        if rank == 0:
            torch.save(scores, Path(exchange, "scores"))
        torch.distributed.barrier()
    except UserError as error:
        Path(exchange, "error").write_text(redacted(str(error)))
        raise SystemExit(1) from None
    finally:
        torch.distributed.destroy_process_group()
