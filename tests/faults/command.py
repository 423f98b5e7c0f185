"""Runs a command of src with injected faults, in a form that Lightning can start again for each rank.

FAULTS='<base64 of pickled faults>' python -m tests.faults.command train trainer=ddp ...
"""

import base64
import importlib
import os
import pickle
import sys


def main() -> None:
    for fault, pending in pickle.loads(base64.b64decode(os.environ["FAULTS"])):
        fault.install(pending)
    # Lightning starts the other ranks with only the overrides
    name = os.environ.setdefault("COMMAND", sys.argv[1])
    if "LOCAL_RANK" not in os.environ:
        del sys.argv[1]
    importlib.import_module(f"src.{name}").main()


if __name__ == "__main__":
    main()
