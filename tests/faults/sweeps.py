"""Sweeps that are killed, on all launchers, with several processes per job, and of 1,000 jobs.

    python -m tests.faults.sweeps kills --times 10     12 jobs on 2 slots; the launcher and a job are killed
    python -m tests.faults.sweeps launchers            the same sweep by every launcher
    python -m tests.faults.sweeps ddp                  two processes in each job, and one of them killed
    python -m tests.faults.sweeps throughput           2 slots against one job after the other
    python -m tests.faults.sweeps start                where the time until the first step goes
    python -m tests.faults.sweeps thousand             1,000 jobs that only write a score

Each prints one JSON object. Jobs are single-threaded: OMP_NUM_THREADS=1.
"""

import argparse
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.faults.processes import ROOT, TINY

PYTHON = sys.executable
# The same training without previews, scores and curves.
PLAIN = (
    *(option for option in TINY if not option.startswith("callbacks.")),
    *("callbacks=none", "metrics=none", "callbacks.checkpoints.every=1000"),
)
TWELVE = ("schedule=linear,cosine", "parameterization=eps,v", "seed=0,1,2")
SLOTS = ("launcher=local", "launcher.devices=[]", "launcher.jobs=2")


def environment(folder: Path) -> dict[str, str]:
    """Of a command without a wandb key, with leases and caches under a folder."""
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    own = {"HOME": str(folder), "TMPDIR": str(folder / "tmp"), "DIFFUSION_LAB_CACHE": str(folder / "cache")}
    plain = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return {**plain, **own, "OMP_NUM_THREADS": "1", "COLUMNS": "160", "GOMP_SPINCOUNT": "1000"}


def command(folder: Path, *options: str, entry_point: str = "train") -> list[str]:
    return [PYTHON, "-m", f"src.{entry_point}", "-m", *options, f"runs={folder / 'runs'}"]


def started(folder: Path, *options: str, entry_point: str = "train") -> subprocess.Popen:
    """A sweep in a session of its own; what it prints goes to <folder>/log."""
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            command(folder, *options, entry_point=entry_point),
            cwd=ROOT,
            env=environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finished(
    folder: Path, *options: str, entry_point: str = "train", status: int = 0, limit: float = 600
) -> float:
    """Runs a sweep to its end; returns its seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    process = started(folder, *options, entry_point=entry_point)
    assert process.wait(limit) == status, (folder / "log").read_text()[-3000:]
    return time.monotonic() - begin


def jobs_of(folder: Path) -> dict[int, Path]:
    """The folders of the jobs of the only sweep."""
    (sweep,) = (folder / "runs" / "sweeps").iterdir()
    return {int(path.name.split("_")[0]): path for path in sweep.iterdir() if (path / "running").is_file()}


def scores_of(folder: Path) -> dict[int, dict[str, float]]:
    return {n: json.loads((job / "outcome.json").read_text())["scores"] for n, job in jobs_of(folder).items()}


def weights_of(folder: Path) -> dict[int, list[Any]]:
    """The network's weights and averages in the last checkpoint of each job."""
    import torch

    found = {}
    for number, job in jobs_of(folder).items():
        last = max((job / "checkpoints").glob("step_*.ckpt"))
        content = torch.load(last, weights_only=True, map_location="cpu")
        averages = [s["weights"] for name, s in content["callbacks"].items() if name.startswith("EMA")]
        found[number] = [content["global_step"], content["state_dict"], *averages]
    return found


def same(a: Any, b: Any) -> bool:
    """Whether two nested structures are bit-equal."""
    import torch

    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def running_jobs(folder: Path) -> list[int]:
    """The processes of jobs, not those of the launcher or of wandb."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            if str(folder) in " ".join(words) and "-m" in words and words.count("-m") == 1:
                found.append(int(path.parent.name))
    return found


def kills(times: int, first: int) -> dict[str, Any]:
    """12 jobs on 2 slots; SIGKILL of the launcher, then of a job; the same command continues."""
    options = (*TINY, *TWELVE, "logger=wandb", *SLOTS)
    record: dict[str, Any] = {"repetitions": 0, "equal": 0, "jobs": 12}
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        record["undisturbed_s"] = round(finished(home / "whole", *options), 1)
        scores, weights = scores_of(home / "whole"), weights_of(home / "whole")
        for repetition in range(first, first + times):
            folder, draw = home / str(repetition), random.Random(repetition)
            folder.mkdir()
            at = draw.uniform(0.25, 0.6) * record["undisturbed_s"]
            launcher = started(folder, *options)
            time.sleep(at)
            ended_before = launcher.poll() is not None
            os.kill(launcher.pid, signal.SIGKILL)
            launcher.wait()
            if ended_before:
                print(f"repetition {repetition}: ended before the kill, does not count", file=sys.stderr)
                continue
            second = started(folder, *options)
            time.sleep(draw.uniform(8, 14))
            victims = running_jobs(folder)
            if victims:
                os.kill(draw.choice(victims), signal.SIGKILL)
            # A job of the first launcher that was killed is run again; one of the second stays open.
            if second.wait(600):
                finished(folder, *options)
            ids = [(job / "wandb_run_id").read_text() for job in jobs_of(folder).values()]
            events = [len(list(job.glob("wandb/offline-run-*"))) for job in jobs_of(folder).values()]
            problems = {
                "killed no job": not victims,
                "jobs": len(jobs_of(folder)) != 12,
                "scores": scores_of(folder) != scores,
                "weights": not same(weights_of(folder), weights),
                "wandb runs": len(set(ids)) != 12 or 0 in events,
                "folders": len({job.resolve() for job in jobs_of(folder).values()}) != 12,
                "left over": bool([p for p in folder.rglob("*.tmp") if "wandb" not in p.parts]),
            }
            found = [name for name, is_wrong in problems.items() if is_wrong]
            record["repetitions"] += 1
            record["equal"] += not found
            record.setdefault("problems", []).extend(found)
            print(f"repetition {repetition}: killed at {at:.0f} s; {found or 'equal'}", file=sys.stderr)
    return record


LAUNCHERS = {
    "serial": ("launcher=serial",),
    "local": SLOTS,
    "submitit": ("launcher=slurm", "launcher.cluster=local", "launcher.gpus=0", "launcher.jobs=2"),
    "ray": ("launcher=ray",),
}


def launchers() -> dict[str, Any]:
    """The scores of the same sweep by every launcher."""
    record: dict[str, Any] = {"seconds": {}}
    with tempfile.TemporaryDirectory() as name:
        home, scores, weights = Path(name), {}, {}
        for launcher, chosen in LAUNCHERS.items():
            options = (*TINY, "schedule=linear,cosine", "seed=0,1", *chosen)
            record["seconds"][launcher] = round(finished(home / launcher, *options), 1)
            scores[launcher], weights[launcher] = scores_of(home / launcher), weights_of(home / launcher)
        record["equal scores"] = {name: found == scores["serial"] for name, found in scores.items()}
        record["equal weights"] = {name: same(found, weights["serial"]) for name, found in weights.items()}
        record["jobs"] = len(scores["serial"])
    return record


FIFTY = (*PLAIN, "trainer.max_steps=50", "model.dropout=0")
# In float32, Adam amplifies the rounding of the first steps.
EXACT = "trainer.precision=64-true"
TWO = ("trainer.devices=2", "trainer.strategy=ddp")


def ddp() -> dict[str, Any]:
    """Two processes in a job against one, after 50 steps; and a job of which a rank is killed."""
    record: dict[str, Any] = {"largest difference": {}}
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        finished(home / "one", *FIFTY, EXACT, "seed=0")
        for launcher, chosen in LAUNCHERS.items():
            finished(home / launcher, *FIFTY, EXACT, *TWO, "seed=0", *chosen)
            (job,) = jobs_of(home / launcher).values()
            record["largest difference"][launcher] = largest_difference(home / "one", home / launcher)
            assert len(list((home / launcher / "runs" / "sweeps").iterdir())) == 1
            assert len(list(job.parent.glob("*/checkpoints"))) == 1
        finished(home / "one-32", *FIFTY, "seed=0")
        finished(home / "two-32", *FIFTY, *TWO, "seed=0")
        record["in float32"] = largest_difference(home / "one-32", home / "two-32")
        record["killed rank"] = {name: killed_rank(home, name) for name in ("local", "submitit")}
    return record


def largest_difference(a: Path, b: Path) -> float:
    """Between the weights of two sweeps of one job."""
    (_, one, *_), (_, two, *_) = weights_of(a)[0], weights_of(b)[0]
    return max(float((two[name] - w).abs().max()) for name, w in one.items() if w.is_floating_point())


def killed_rank(home: Path, launcher: str) -> dict[str, Any]:
    """Seconds from the kill of the second rank to the end of the sweep, and the line of the job."""
    folder = home / f"killed-{launcher}"
    folder.mkdir()
    endless = (*FIFTY, *TWO, "trainer.max_steps=100000", "callbacks.checkpoints.every=20")
    process = started(folder, *endless, "seed=0", *LAUNCHERS[launcher])
    deadline = time.monotonic() + 120
    rank = None
    while rank is None and time.monotonic() < deadline:
        time.sleep(1)
        if list(folder.glob("runs/sweeps/*/*/checkpoints/step_*.ckpt")):
            rank = next((pid for pid in running_jobs(folder) if _variable(pid, "LOCAL_RANK") == "1"), None)
    os.kill(rank, signal.SIGKILL)
    begin = time.monotonic()
    status = process.wait(120)
    ended = time.monotonic() - begin
    (job,) = jobs_of(folder).values()
    outcome = json.loads((job / "outcome.json").read_text()) if (job / "outcome.json").is_file() else {}
    return {"seconds": round(ended, 1), "status": status, "error": outcome.get("error")}


def _variable(pid: int, name: str) -> str | None:
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0"):
            if entry.startswith(f"{name}="):
                return entry.partition("=")[2]
    return None


def throughput(steps: int) -> dict[str, Any]:
    """12 single-thread jobs of the default training on two slots against one after the other in one process."""
    options = ("callbacks=none", "metrics=none", "logger=csv", *TWELVE, f"trainer.max_steps={steps}")
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        two = finished(home / "two", *options, *SLOTS, limit=3600)
        one = finished(home / "one", *options, limit=3600)
        equal = same(weights_of(home / "two"), weights_of(home / "one"))
    return {
        "steps": steps,
        "serial_s": round(one, 1),
        "two_slots_s": round(two, 1),
        "ratio": two / one,
        "equal": equal,
    }


WATCHED = """
import sys, time
begin = float(sys.argv.pop(1))
moments = {"python": time.time()}
import src.app.jobs, src.app.train
moments["imports"] = time.time()
from src.training.module import DiffusionModule
first = DiffusionModule.training_step
assemble = src.app.train.assemble
def assembled(*arguments):
    moments["composed"] = time.time()
    made = assemble(*arguments)
    moments["assembled"] = time.time()
    return made
src.app.train.assemble = assembled
def step(*arguments):
    moments.setdefault("before the first step", time.time())
    made = first(*arguments)
    return made
DiffusionModule.training_step = step
from src.train import main
main()
moments["end"] = time.time()
last = begin
for name, moment in moments.items():
    print("MOMENT", name, moment - last)
    last = moment
"""


def start() -> dict[str, Any]:
    """Seconds of the parts of a job's start, the median of 3."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for number in range(3):
            folder = Path(name) / str(number)
            options = (*PLAIN, "trainer.max_steps=1", f"runs={folder}")
            made = subprocess.run(
                [PYTHON, "-c", WATCHED, str(time.time()), *options],
                cwd=ROOT,
                env=environment(folder),
                capture_output=True,
                text=True,
                check=True,
            )
            for line in made.stdout.splitlines():
                if line.startswith("MOMENT"):
                    *words, seconds = line.split()[1:]
                    found.setdefault(" ".join(words), []).append(float(seconds))
    parts = {part: round(statistics.median(values), 2) for part, values in found.items() if part != "end"}
    return {"to the first step": round(sum(parts.values()), 2), **parts}


def thousand(count: int) -> dict[str, Any]:
    """Jobs that only write a score: seconds of the parts of a sweep, and the memory of the launcher."""
    from src.app.sweep import local
    from src.app.sweep.jobs import Job, Sweep
    from src.app.sweep.table import print_tables

    script = 'echo "{\\"fd\\": $1, \\"val/loss\\": 1.0}" > "$DIFFUSION_LAB_SCORES_TO"'
    Job.command = lambda job: ["/bin/sh", "-c", script, "job", str(job.number % 7)]
    local.POLL = 0.005
    record: dict[str, Any] = {"jobs": count}
    peaks = {}
    with tempfile.TemporaryDirectory() as name:
        os.environ |= {"TMPDIR": name, "CUDA_VISIBLE_DEVICES": ""}
        tempfile.tempdir = None
        seeds = f"seed=range({count // 10})"
        begin = time.monotonic()
        sweep = Sweep("train", Path(name) / "sweep", ["schedule=linear,cosine", "model=a,b,c,d,e", seeds])
        sweep.write()
        record["make_s"] = round(time.monotonic() - begin, 2)
        sys.stdout.flush()
        for part in range(4):
            quarter = sweep.jobs[part * count // 4 : (part + 1) * count // 4]
            begin = time.monotonic()
            with open(os.devnull, "w") as nowhere:
                kept, sys.stdout = sys.stdout, nowhere
                local.Local(jobs=2).run(quarter, count)
                sys.stdout = kept
            peaks[f"{(part + 1) * count // 4} jobs"] = (
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            )
            record["run_s"] = round(record.get("run_s", 0) + time.monotonic() - begin, 1)
        record["launcher_peak_MB"] = peaks
        begin = time.monotonic()
        again = Sweep("train", Path(name) / "sweep", sweep.overrides)
        waiting = again.waiting(rerun_failed=False)
        record["list_s"] = round(time.monotonic() - begin, 2)
        begin = time.monotonic()
        outcomes = again.outcomes()
        with open(os.devnull, "w") as nowhere:
            kept, sys.stdout = sys.stdout, nowhere
            print_tables(again, outcomes, pairs=True)
            sys.stdout = kept
        record["table_s"] = round(time.monotonic() - begin, 2)
        record["waiting"], record["scored"] = len(waiting), len(outcomes)
        record["files_KB"] = sum(p.stat().st_size for p in Path(name).rglob("*") if p.is_file()) // 1024
        record["jobs.json_KB"] = (Path(name) / "sweep" / "jobs.json").stat().st_size // 1024
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("kills", "launchers", "ddp", "throughput", "start", "thousand"))
    parser.add_argument("--times", type=int, default=10, help="repetitions of `kills`")
    parser.add_argument("--first", type=int, default=0, help="number of the first one, which seeds the draws")
    parser.add_argument("--steps", type=int, default=1000, help="of each job of `throughput`")
    parser.add_argument("--jobs", type=int, default=1000, help="of `thousand`")
    chosen = parser.parse_args()
    arguments = {
        "kills": (chosen.times, chosen.first),
        "throughput": (chosen.steps,),
        "thousand": (chosen.jobs,),
    }
    print(json.dumps(globals()[chosen.what](*arguments.get(chosen.what, ())), indent=1))


if __name__ == "__main__":
    main()
