"""Hostile and damaged run folders: what is changed in a good one, and what must not follow from using it.

Each case changes a copy of a good run folder and then continues the training or samples from it. Required: status 0 or
2, no traceback, at most 10 seconds of CPU time, and no file outside the folder executed, written, changed or deleted;
and the value of an environment variable named in the folder is written nowhere.
"""

import json
import os
import pickle
import random
import shutil
import socket
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from src.runs.files import sidecar_path
from tests.faults.processes import TINY, Command, run, train

SECRET = "s3cr3t-of-this-machine"
SECONDS = 10
PATIENCE = 300
RUN = "runs/untrusted"
TRAIN = ("train", f"ckpt={RUN}", "trainer.max_steps=3")
SAMPLE = ("sample", f"run={RUN}", "n=2", "sampler.steps=3", "device=cpu")
EVALUATE = ("evaluate", f"run={RUN}", "n=4", "metrics=fd_digits", "sampler.steps=3", "device=cpu")
INIT = ("train", f"init={RUN}", *TINY, "trainer.max_steps=1", "metrics=none")
REPORT = ("report", RUN, "out=report.html")
COMMANDS = (TRAIN, SAMPLE, EVALUATE, INIT, REPORT)

UNCHANGED = "nothing changed"
"""A kind of case that must succeed: otherwise each of the others might be refused because of something else."""

Change = Callable[[Path, Path], None]
"""Changes a run folder; the second folder lies outside, holds the files of `precious`, and must stay as it is."""


@dataclass(frozen=True)
class Case:
    """A hostile folder and the command that uses it."""

    kind: str
    name: str
    change: Change
    command: tuple[str, ...] = TRAIN


class Evil:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch ../outside/executed",)


def good_run(folder: Path) -> Path:
    """A small run with previews, averages, snapshots and samples."""
    made = train(folder, "ema=power", "ema.snapshot_every=1", "trainer.max_steps=2", "metrics=none")
    assert made.status == 0, made.output
    (place,) = (folder / "runs").iterdir()
    place.rename(folder / RUN)
    done = run(folder, *SAMPLE)
    assert done.status == 0, done.output
    return folder / RUN


def precious(outside: Path) -> None:
    """Files that no case may touch."""
    (outside / "folder").mkdir(parents=True)
    for name in ("file", "folder/000000.png", "folder/000001.png", "folder/step_00000001.ckpt"):
        (outside / name).write_text("precious")
    (outside / "evil.pickle").write_bytes(pickle.dumps(Evil()))


# --- what is changed ----------------------------------------------------------------------------------------------


def link(name: str, target: str) -> Change:
    def change(run_folder: Path, outside: Path) -> None:
        path = run_folder / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(target.format(outside=outside))

    return change


def pipe(name: str) -> Change:
    def change(run_folder: Path, outside: Path) -> None:
        (run_folder / name).unlink(missing_ok=True)
        os.mkfifo(run_folder / name)

    return change


def unix_socket(run_folder: Path, outside: Path) -> None:
    here = Path.cwd()
    (run_folder / "lock").unlink()
    os.chdir(run_folder)  # its address is at most 108 bytes long
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind("lock")
    finally:
        os.chdir(here)


def text(name: str, content: str | bytes) -> Change:
    def change(run_folder: Path, outside: Path) -> None:
        (run_folder / name).parent.mkdir(exist_ok=True, parents=True)
        (run_folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def content(edit: Callable[[dict[str, Any], Path], Any]) -> Change:
    """Edits the newest checkpoint, or replaces its content by what `edit` returns, and removes the checksum."""

    def change(run_folder: Path, outside: Path) -> None:
        path = max(run_folder.glob("checkpoints/step_*.ckpt"))
        loaded = torch.load(path, weights_only=True)
        changed = edit(loaded, outside)
        torch.save(loaded if changed is None else changed, path)
        sidecar_path(path).unlink(missing_ok=True)

    return change


def option(name: str, value: Any) -> Change:
    """Sets an option of the stored configuration; {outside} in texts is replaced."""

    def edit(loaded: dict[str, Any], outside: Path) -> None:
        node = loaded["config"]
        *parents, last = name.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = json.loads(json.dumps(value).replace("{outside}", str(outside)))

    return content(edit)


def entry(path: tuple[Any, ...], value: Any) -> Change:
    def edit(loaded: dict[str, Any], outside: Path) -> None:
        node: Any = loaded
        for part in path[:-1]:
            node = node[part]
        node[path[-1]] = value

    return content(edit)


def without_checkpoints(loaded: dict[str, Any], outside: Path) -> None:
    del loaded["config"]["callbacks"]["checkpoints"]


def compressed(run_folder: Path, outside: Path) -> None:
    path = max(run_folder.glob("checkpoints/step_*.ckpt"))
    sidecar_path(path).unlink()
    path.unlink()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("step/data.pkl", "w") as member:
        for _ in range(300):
            member.write(bytes(1 << 20))


def damaged(seed: int, truncate: bool, checksum: bool) -> Change:
    """Alters or truncates a file at a random place."""

    def change(run_folder: Path, outside: Path) -> None:
        chance = random.Random(seed)
        path = chance.choice(sorted(p for p in run_folder.rglob("*") if p.is_file() and p.stat().st_size))
        size = path.stat().st_size
        if truncate:
            os.truncate(path, chance.randrange(size))
        else:
            with path.open("r+b") as file:
                file.seek(chance.randrange(size))
                file.write(chance.randbytes(1 + chance.randrange(4)))
        if not checksum and path.suffix == ".ckpt":
            sidecar_path(path).unlink(missing_ok=True)

    return change


def nested(depth: int) -> Any:
    node: Any = 0
    for _ in range(depth):
        node = [node]
    return node


def repeated(levels: int = 40) -> Any:
    """A list of 2^levels parts in a few bytes."""
    node: Any = ["x"]
    for _ in range(levels):
        node = [node, node]
    return node


# --- the cases ------------------------------------------------------------------------------------------------------

STEP = "checkpoints/step_00000002.ckpt"
LINKED_FILES = (
    *(
        "lock",
        "train.log",
        "config.yaml",
        "environment.json",
        "scores.json",
        "wandb_run_id",
        "samples/step_00000003.png",
    ),
    *(
        f"{STEP}.json",
        "checkpoints/best.ckpt",
        "checkpoints/.step_00000003.ckpt.1.tmp",
        "samples/untitled/grid.png",
    ),
)
LINKED_FOLDERS = (
    "checkpoints",
    "samples",
    "csv",
    "scores",
    ".hydra",
    "ema",
    "wandb",
    "tensorboard",
    "csv/version_1",
)
TARGETS: dict[str, dict[str, Any]] = {
    "os.system": {"command": "touch {outside}/executed"},
    "subprocess.run": {"args": ["touch", "{outside}/executed"]},
    "builtins.open": {"file": "{outside}/executed", "mode": "w"},
    "builtins.exec": {"object": "open('{outside}/executed', 'w')"},
    "os.makedirs": {"name": "{outside}/executed"},
    "pathlib.Path.touch": {"self": "{outside}/executed"},
    "torch.load": {"f": "{outside}/evil.pickle", "weights_only": False},
    "torch.nn.modules.module.torch.load": {"f": "{outside}/evil.pickle", "weights_only": False},
    "torch.optim.adam.torch.load": {"f": "{outside}/evil.pickle", "weights_only": False},
    "lightning.pytorch.trainer.trainer.os.system": {"command": "touch {outside}/executed"},
    "lightning.pytorch.Trainer": {"default_root_dir": "{outside}/executed"},
    "lightning.pytorch.loggers.CSVLogger": {"save_dir": "{outside}/executed"},
    "src.runs.machine.subprocess.run": {"args": ["touch", "{outside}/executed"]},
    "src.runs.files.write_json": {"path": "{outside}/executed", "content": {}},
    "src.training.checkpoint.Checkpoints": {"folder": "{outside}/folder", "config": {}, "every": 1},
    "src.training.dashboard.CurveFiles": {"folder": "{outside}/executed"},
}
SLOTS = (
    *(
        "model",
        "schedule",
        "data",
        "loss",
        "sampler",
        "optimizer",
        "trainer",
        "callbacks.progress",
        "callbacks.mine",
    ),
    *(
        "logger.mine",
        "wrappers.mine",
        "model.dropout",
        "metrics.features",
        "ema",
        "callbacks.sample_images.recipe",
    ),
)
PLACES: dict[str, Any] = {
    "cache": "{outside}/folder",
    "runs": "{outside}/folder",
    "name": "../../outside/folder",
    "data.cache": "{outside}/folder",
    "guidance": {
        "_target_": "src.diffusion.guidance.AutoGuidance",
        "_partial_": True,
        "run": "{outside}/folder",
    },
    "conditioning": {
        "_target_": "src.conditioning.ByText",
        "encoder": {
            "_target_": "src.data.text_encoder.Pretrained",
            "name": "{outside}/folder",
            "cache": "{outside}/folder",
        },
    },
    "launcher": {"_target_": "src.app.sweep.cluster.Slurm"},
    "trainer.default_root_dir": "{outside}/folder",
    "trainer.profiler": {
        "_target_": "lightning.pytorch.profilers.SimpleProfiler",
        "dirpath": "{outside}/folder",
    },
    "trainer.logger": True,
    "callbacks.checkpoints.folder": "{outside}/folder",
    "callbacks.mine": {
        "_target_": "src.training.checkpoint.Checkpoints",
        "folder": "{outside}/folder",
        "config": {},
    },
    "callbacks.best": {
        "_target_": "lightning.pytorch.callbacks.ModelCheckpoint",
        "dirpath": "{outside}/folder",
    },
    "callbacks.sample_images.folder": "{outside}/folder",
    "logger.mine": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "{outside}/folder"},
    "logger.tensorboard": {
        "_target_": "lightning.pytorch.loggers.TensorBoardLogger",
        "name": "../../../outside/folder",
    },
    "callbacks.curves.every": "{outside}/folder",
    "hydra.run.dir": "{outside}/folder",
    "hydra.callbacks.evil": {"_target_": "os.makedirs", "name": "{outside}/executed"},
    "model.defaults": ["/../../outside/evil"],
    "defaults": ["/../../outside/evil"],
}
TEXTS = (
    *(
        "${oc.env:MY_SECRET}",
        "x${oc.env:MY_SECRET}",
        "\\\\${oc.env:MY_SECRET}",
        "${oc.decode:${oc.env:MY_SECRET}}",
    ),
    *(
        "${oc.env:'MY_SECRET'}",
        "${hydra:runtime.cwd}",
        "${model}",
        "${.}",
        "${oc.create:${oc.env:MY_SECRET}}",
        "${",
    ),
)
TEXT_SLOTS = (
    "name",
    "data.root",
    "cache",
    "runs",
    "model.dropout",
    "logger.wandb.project",
    "metrics.features.weights",
)
LINES = (
    "+hydra.callbacks.evil={_target_: os.makedirs, name: ../outside/executed}",
    "hydra.job_logging.handlers.file.filename=../outside/executed",
    "+optimizer@_global_.hydra.callbacks.evil=adam",
    "experiment='../../../../outside/evil'",
    "--config-dir=../outside",
    "trust=[os]",
    "~callbacks.checkpoints",
    "+logger.mine={_target_: lightning.pytorch.loggers.CSVLogger, save_dir: '../outside/x_${oc.env:MY_SECRET}'}",
)
JSONS: dict[str, str | bytes] = {
    "a list": "[]",
    "null": "null",
    "a text as step": '{"size": 1, "sha256": "x", "step": "x"}',
    "deep nesting": "[" * 100_000,
    "deep nesting of objects": '{"a":' * 100_000,
    "a huge number": '{"size": 1e999, "sha256": 5, "step": 1' + "0" * 5000 + "}",
    "no text": b"\xff\xfe\x00",
    "nothing": "",
    "30 MB": " " * (30 << 20),
    "text": "hello",
}
READ_BY_REPORTS = ("environment.json", "scores.json", "outcome.json", "bands.json", "checkpoints/best.json")
CURVES = (
    ("step,train/samples,train/images_per_second,train/loss", "inf,NaN,1e-320,1e999"),
    ("step,train/samples,train/images_per_second,train/loss", "-1,1e14,1e-300,x"),
    ("step,train/loss_q\u00b2,train/loss_q" + "9" * 5000, "1,1,1"),
    ("step,step,,<script>", "1,2,3,4,5,6"),
)
ODD = (
    None,
    "x",
    -1,
    1 << 70,
    float("nan"),
    [],
    {},
    True,
    nested(3),
    repeated(),
    {"a": {"b": 1}},
    b"x",
    1e300,
)
ENTRIES: tuple[tuple[Any, ...], ...] = (
    *(("global_step",), ("epoch",), ("state_dict",), ("config",), ("callbacks",), ("origin",), ("loops",)),
    *(("optimizer_states",), ("lr_schedulers",), ("ImageDataModule",), ("ImageDataModule", "samples")),
    *(
        ("loops", "fit_loop", "epoch_loop.batch_progress"),
        ("loops", "fit_loop", "epoch_progress", "current", "ready"),
    ),
    *(("optimizer_states", 0, "state", 0, "exp_avg"), ("optimizer_states", 0, "param_groups", 0, "lr")),
    *(("lr_schedulers", 0, "step"), ("lr_schedulers", 0, "last_epoch"), ("lr_schedulers", 0, "base_lrs")),
    *(
        ("origin", "code"),
        ("origin", "world_size"),
        ("origin", "machine"),
        ("callbacks", "EMA", "weights"),
    ),
    *(("callbacks", "EMA"), ("callbacks", "SkipNonFinite", "skipped"), ("pytorch-lightning_version",)),
    *(("config", "model"), ("config", "callbacks"), ("config", "trainer"), ("config", "data", "image_size")),
)
SIZES = (
    *(
        ("model.base_channels", 1 << 20),
        ("model.blocks_per_level", 10**9),
        ("model.channel_multipliers", [1] * 100_000),
    ),
    *(("schedule.T", 10**13), ("sampler.steps", 10**12), ("model.groups", 0), ("data.image_size", 10**7)),
    *(("ema.stds", [0.1] * 100_000), ("model.base_channels", 10**30), ("name", "x" * 10**7)),
)


def cases(seed: int = 0) -> Iterator[Case]:
    """About 280 cases, the same for the same seed."""
    chance = random.Random(seed)
    both = (TRAIN, SAMPLE)
    for command in COMMANDS:
        yield Case(UNCHANGED, command[0], lambda *_: None, command)
    for number, name in enumerate(LINKED_FILES):
        yield Case("links", f"{name} -> a file", link(name, "{outside}/file"), COMMANDS[number % 5])
        yield Case("links", f"{name} -> a file that does not exist", link(name, "{outside}/new"))
    for number, name in enumerate(LINKED_FOLDERS):
        yield Case("links", f"{name} -> a folder", link(name, "{outside}/folder"), COMMANDS[number % 5])
    for name, target in (
        ("samples", "/"),
        ("csv", ".."),
        ("scores", "scores"),
        ("lock", "../../../outside/file"),
    ):
        yield Case("links", f"{name} -> {target}", link(name, target))
    for number, name in enumerate(
        (STEP, f"{STEP}.json", "environment.json", "lock", "train.log", "wandb_run_id")
    ):
        yield Case("pipes and sockets", f"pipe {name}", pipe(name), both[number % 2])
        yield Case("pipes and sockets", f"pipe {name}", pipe(name), (INIT, REPORT)[number % 2])
    yield Case("pipes and sockets", "a socket", unix_socket)
    for number, (target, arguments) in enumerate(TARGETS.items()):
        for slot in chance.sample(SLOTS, 3):
            node = {"_target_": target, **arguments}
            yield Case("foreign classes", f"{slot}: {target}", option(slot, node), both[number % 2])
    for name, value in PLACES.items():
        yield Case("places", f"{name}={value}", option(name, value))
    yield Case("places", "no checkpoints", content(without_checkpoints))
    for number, template in enumerate(TEXTS):
        for slot in chance.sample(TEXT_SLOTS, 2):
            yield Case("interpolations", f"{slot}={template}", option(slot, template), both[number % 2])
    bomb = {"a0": "x" * 10, **{f"a{i}": f"${{wrappers.a{i - 1}}}" * 2 for i in range(1, 40)}}
    yield Case("interpolations", "doubling", option("wrappers", bomb))
    yield Case("interpolations", "doubling", option("model", bomb), SAMPLE)
    for line in LINES:
        yield Case("stored overrides", line, text(".hydra/overrides.yaml", yaml.safe_dump([*TINY, line])))
    for number, (name, found) in enumerate(JSONS.items()):
        yield Case("JSON", f"record of a checkpoint: {name}", text(f"{STEP}.json", found), both[number % 2])
    for file in ("environment.json", "scores.json", "wandb_run_id", "csv/version_x", "samples/untitled"):
        name = chance.choice(sorted(JSONS))
        yield Case("JSON", f"{file}: {name}", text(file, JSONS[name]))
    for file in (
        *READ_BY_REPORTS,
        "config.yaml",
        "csv/version_0/metrics.csv",
        "csv/version_\u00b2/metrics.csv",
    ):
        for name in chance.sample(sorted(JSONS), 2):
            yield Case("JSON", f"{file}: {name}", text(file, JSONS[name]), REPORT)
    for header, row in CURVES:
        yield Case(
            "JSON",
            f"curves: {header[:40]}, {row}",
            text("csv/version_0/metrics.csv", f"{header}\n{row}\n"),
            REPORT,
        )
    bomb = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]\n" for i in range(12))
    yield Case("bombs", "config.yaml: aliases", text("config.yaml", bomb), REPORT)
    for number, path in enumerate(ENTRIES):
        for index in chance.sample(range(len(ODD)), 2):
            name = f"{'.'.join(map(str, path))}: odd value {index}, {type(ODD[index]).__name__}"
            yield Case("wrong types", name, entry(path, ODD[index]), both[number % 4 == 3])
    for number, (name, value) in enumerate(SIZES):
        yield Case("bombs", f"{name}={str(value)[:20]}", option(name, value), both[number % 2])
    for command in both:
        yield Case("bombs", "compressed", compressed, command)
        yield Case("bombs", "deep nesting", content(lambda loaded, _: loaded | {"x": nested(200)}), command)
        yield Case("bombs", "repeated parts", content(lambda loaded, _: loaded | {"x": repeated()}), command)
        huge = torch.zeros(1).expand(10**7, 10**5)
        yield Case(
            "bombs",
            "a huge tensor",
            entry(("state_dict", "loss.denoiser.network.conv_in.bias"), huge),
            command,
        )
    for part in ("state_dict", "config", "callbacks", "origin"):
        yield Case("pickles", part, entry((part,), Evil()), chance.choice(both))
    yield Case("pickles", "alone", text(STEP, pickle.dumps(Evil())), SAMPLE)
    for number in range(45):
        change = damaged(number, truncate=number % 2 == 0, checksum=number % 3 == 0)
        yield Case("damaged at random", str(number), change, COMMANDS[number % 5])


# --- what must not follow -------------------------------------------------------------------------------------------


def problem(case: Case, good: Path, folder: Path) -> str | None:
    """Runs a case in `folder`; a description of what went wrong, None if nothing did."""
    work, outside = folder / "work", folder / "outside"
    precious(outside)
    shutil.copytree(good, work / RUN, symlinks=True)
    case.change(work / RUN, outside)
    before, others = _content(outside), set(work.iterdir())
    command = Command(work, case.command, environment={"MY_SECRET": SECRET, "WANDB_MODE": "offline"}).start()
    began = time.monotonic()
    while command.process.exitcode is None:
        command.process.join(0.05)
        if _cpu_seconds(command.process.pid) > SECONDS or time.monotonic() - began > PATIENCE:
            command.kill()
            return f"hangs: {command.output[-200:]}"
    status = command.wait(1)
    extra = {path.name for path in set(work.iterdir()) - others} - {command.log.name, "cache", "report.html"}
    if "Traceback" in command.output or status not in ((0,) if case.kind == UNCHANGED else (0, 2)):
        return f"status {status}: {command.output.strip()[-300:]}"
    if _content(outside) != before or extra:
        return f"changed outside: {sorted(_content(outside).items() ^ before.items())} {sorted(extra)}"
    for path in folder.rglob("*"):
        if SECRET in str(path.relative_to(folder)):
            return f"secret in the name of {path}"
        if path.is_file() and not path.is_symlink() and SECRET.encode() in path.read_bytes():
            return f"secret in {path}"
    return None


def _content(folder: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))
    }


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
