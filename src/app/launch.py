"""Several processes for one job of sampling or evaluation: `devices=2`."""

import logging
import os
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

from src.app.environment import redact, redacted
from src.errors import UserError
from src.runs.output import forgiving_output
from src.runs.stopping import LOST_CONNECTION, describe_status, die_with, stop_signal

Job = Callable[[DictConfig], dict[str, float]]


def launch(job: Job, config: DictConfig) -> dict[str, float]:
    """Runs a job in this process, or with `devices` > 1 in as many new ones that share the work.

    The processes meet by torch.distributed: nccl on GPUs, gloo on the CPU. The first one's result is returned; if one
    fails, the others are ended. They end with this process, too.

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
        arguments = (os.getpid(), job, content, config.devices, address, on_gpus, threads, exchange)
        # it would announce that it ends the other processes
        logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
        started = torch.multiprocessing.spawn(_process, arguments, nprocs=config.devices, join=False)
        try:
            while not started.join():
                pass
        except (
            torch.multiprocessing.ProcessRaisedException,
            torch.multiprocessing.ProcessExitedException,
        ) as error:
            message = Path(exchange, "error")
            if message.is_file():
                raise UserError(message.read_text()) from None
            _explain(error, [process.exitcode for process in started.processes])
            raise
        finally:
            for process in started.processes:  # alive after a signal to this process
                process.kill()
        return torch.load(Path(exchange, "scores"), weights_only=True)


def _explain(error: Any, statuses: list[int]) -> None:
    """Raises what the end of a process by a signal means; returns after an exception of a process."""
    rank = error.error_index
    if LOST_CONNECTION.search(str(error)):  # because of another process that has ended
        rank = next((other for other, status in enumerate(statuses) if status < 0), rank)
    if signum := stop_signal(statuses[rank]):
        raise SystemExit(128 + signum) from None
    if statuses[rank] < 0:
        raise UserError(f"process {rank} of {len(statuses)} {describe_status(statuses[rank])}") from None


def _process(
    rank: int,
    parent: int,
    job: Job,
    content: dict[str, Any],
    world_size: int,
    address: str,
    on_gpus: bool,
    threads: int,
    exchange: str,
) -> None:
    from src.app.build import trusting
    from src.app.jobs import register

    die_with(parent)
    register()
    handler = logging.StreamHandler(sys.stdout)
    handler.addFilter(redact)
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.ERROR, format="%(message)s", handlers=[handler]
    )
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
        with forgiving_output(), trusting(config.trust):
            scores = job(config)
        if rank == 0:
            torch.save(scores, Path(exchange, "scores"))
        torch.distributed.barrier()
    except UserError as error:
        Path(exchange, "error").write_text(redacted(str(error)))
        raise SystemExit(1) from None
    finally:
        torch.distributed.destroy_process_group()
