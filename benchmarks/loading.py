"""A run as the entry points load it."""

from hydra import compose, initialize_config_dir

from src.app import jobs
from src.app.load import load_with
from src.app.options import CONF
from src.generation.loaded import LoadedRun


def loaded_run(run: str, *options: str) -> LoadedRun:
    """A run as `src.sample` loads it, with options of `src.sample`."""
    jobs.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return load_with(compose("sample", [f"run={run}", *options]))[0]
