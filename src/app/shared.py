"""What several jobs of one process share: models, data and scores with their references.

Outside of `sharing`, nothing is kept. Within it, the last object of each kind is kept, and used again if it would be
made in the same way.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

_kept: ContextVar[dict[str, tuple[Any, Any]] | None] = ContextVar("kept", default=None)


@contextmanager
def sharing() -> Iterator[None]:
    """Within it, `shared` keeps objects."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def shared(kind: str, key: Any, make: Callable[[], T]) -> T:
    """The object that `make` returns, or the kept one of this kind if its key is equal.

    Args:
        kind: e.g. "network".
        key: everything that the object depends on.
        make: called without arguments.
    """
    kept = _kept.get()
    if kept is None:
        return make()
    if kind not in kept or kept[kind][0] != key:
        kept.pop(kind, None)  # frees its memory before the new one is made
        kept[kind] = (key, make())
    return kept[kind][1]
