"""From a node of the configuration to an object; mistakes in the node become one-line errors.

A `_target_` can name classes of this project, of torch.optim, of lightning.pytorch, and of the packages that the
command line trusts (`trust=[mypackage]`); and only where an object of their kind is expected. What a run folder may
name is less: see `src.app.stored`.
"""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.app.environment import environment
from src.errors import UserError

T = TypeVar("T")

# Where classes may come from. The name alone is not enough: through torch.nn.modules.module.torch one reaches all of
# torch, so the resolved object's own module is checked too.
ALLOWED_PACKAGES = ("src.", "torch.optim.", "lightning.pytorch.")
# Groups whose files choose and set options of other groups.
OF_SEVERAL_GROUPS = ("experiment", "speedrun", "preset", "debug")
_trusted: ContextVar[tuple[str, ...]] = ContextVar("trusted", default=())


@contextmanager
def trusting(packages: Sequence[str]) -> Iterator[None]:
    """Within it, a `_target_` may also name classes of these packages.

    Raises:
        UserError: a name is not that of a package, or it cannot be imported.
    """
    from importlib import import_module

    for name in packages:
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
            raise UserError(f"trust={name!r}: give names of Python packages, e.g. trust=[mypackage]")
        try:
            import_module(name)
        except ImportError as error:
            raise UserError(
                f"trust={name}: cannot be imported ({error}); install it, or start from the folder that holds it"
            ) from None
    token = _trusted.set(tuple(f"{name}." for name in packages))
    try:
        yield
    finally:
        _trusted.reset(token)


def trusted() -> tuple[str, ...]:
    """Prefixes of the names of classes in packages that the command line trusts."""
    return _trusted.get()


def allowed() -> tuple[str, ...]:
    """Prefixes of the names that a `_target_` may have."""
    return ALLOWED_PACKAGES + trusted()


def build(node: DictConfig | None, kind: type[T], option: str, **joined: Any) -> T | Any:
    """The object that a configuration node describes.

    Args:
        node: has a `_target_`, the class, and its numbers; `_partial_: true` gives a functools.partial. Empty
            or None gives None.
        kind: what the object must be an instance of (or make, if partial).
        option: the node's place in the configuration, for messages.
        joined: further arguments of the constructor: built objects and derived numbers.

    Raises:
        UserError: an unknown or forbidden class, an unknown option, a wrong type or number, or an option that is set
            by the framework.
    """
    if not node:
        return None
    with environment.revealed():
        numbers = resolve(node, option)
    _check(numbers, (kind,), option)
    return _construct(numbers, option, joined)


def _construct(numbers: Mapping[str, Any], option: str, joined: Mapping[str, Any]) -> Any:
    arguments = {
        name: _construct(value, f"{option}.{name}", {}) if _is_node(value) else value
        for name, value in numbers.items()
        if name not in ("_target_", "_partial_")
    }
    for name in arguments:
        if name in joined:
            raise UserError(f"{option}.{name}: the framework sets this option itself; leave it out")
    target = get_object(numbers["_target_"])
    make = partial(target, **arguments, **joined)
    if numbers.get("_partial_"):
        return make
    try:
        inspect.signature(target).bind(**arguments, **joined)
    except TypeError as error:
        raise UserError(f"{option}: {target.__name__}: {error}") from None
    try:
        return make()
    except (ArithmeticError, MemoryError, RuntimeError) as error:  # of absurd numbers
        first = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{option}: {target.__name__} cannot be built with these options: {first[:200]}"
        ) from None
    except ValueError as error:
        known = {*arguments, *(name for name, value in joined.items() if isinstance(value, int | list))}
        raise UserError(f"{option}.{error}" if named(error) in known else f"{option}: {error}") from None


def class_of(node: Any) -> type | None:
    """The class that a node names; None where it may not be named or does not exist, which `build` reports.

    Nothing is imported for a name that is not allowed.
    """
    try:
        return find_class(node, "", allowed()) if node else None
    except UserError:
        return None


def takes(node: DictConfig, name: str) -> bool:
    """Whether the constructor of a node's class has an argument of this name."""
    found = class_of(node)
    return found is not None and name in inspect.signature(found).parameters


def named(error: ValueError) -> str:
    """The argument that the error of a constructor begins with, if it begins with one."""
    return re.split(r"[=,\s]", str(error), maxsplit=1)[0]


def _is_node(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def resolve(node: DictConfig, option: str) -> dict[str, Any]:
    """The node as plain dictionaries, interpolations resolved; `${oc.env:...}` stays text (see `Environment`).

    Raises:
        UserError: an interpolation leads nowhere, or a value is missing.
    """
    try:
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{option}: {str(error).splitlines()[0]}") from None


def find_class(numbers: Mapping[str, Any], option: str, packages: tuple[str, ...]) -> type:
    """The class that a node names. Nothing is imported for a name outside the packages.

    Args:
        numbers: the node.
        option: its place in the configuration, for messages.
        packages: prefixes of allowed names, each with a dot at its end.

    Raises:
        UserError: the name is missing, is not allowed or does not exist.
    """
    name = numbers.get("_target_")
    if not isinstance(name, str):
        raise UserError(f"{option} needs a _target_, the name of a class; choose one of the group's files")
    if not name.startswith(packages):
        raise UserError(
            f"{option}._target_={name[:200]} is not allowed: classes come from {', '.join(packages)} and from packages"
            " that you trust on the command line, e.g. trust=[mypackage]"
        )
    try:
        target = get_object(name)
    except Exception:
        raise UserError(f"{option}._target_={name[:200]} does not exist") from None
    home = f"{getattr(target, '__module__', None)}."
    if not inspect.isclass(target) or not home.startswith(packages):
        raise UserError(
            f"{option}._target_={name[:200]} is not allowed: it is no class of {', '.join(packages)}"
        )
    return target


def _check(numbers: Mapping[str, Any], kinds: tuple[type, ...], option: str) -> None:
    """Checks a node, and the nodes below it, against what is allowed where it stands."""
    target = find_class(numbers, option, allowed())
    if not issubclass(target, kinds):
        raise UserError(
            f"{option}._target_={numbers['_target_']} is no {' or '.join(kind.__name__ for kind in kinds)}"
        )
    _check_values(target, numbers, option)


def _check_values(target: type, numbers: Mapping[str, Any], option: str) -> None:
    parameters = inspect.signature(target.__init__).parameters
    # object's own constructor takes anything only to refuse it
    open_ended = target.__init__ is not object.__init__ and any(
        p.kind is p.VAR_KEYWORD for p in parameters.values()
    )
    typed = f"{target.__module__}.".startswith(("src.", "torch.optim.", *trusted()))
    try:
        hints = get_type_hints(target.__init__)
    except NameError:  # some libraries name types that are there for type checkers only
        hints = {}
    options = {name: value for name, value in numbers.items() if name not in ("_target_", "_partial_")}
    if unknown := [] if open_ended else [name for name in options if name not in parameters]:
        known = ", ".join(p for p in parameters if p not in ("self", "args", "kwargs"))
        raise UserError(
            f"{option}.{unknown[0]}: {target.__name__} has no such option; it has {known or 'none'}"
            f"{_left_over(option, unknown)}"
        )
    for name, value in options.items():
        if _is_node(value):
            kinds = _classes(hints.get(name))
            if not kinds:
                raise UserError(f"{option}.{name}._target_={value['_target_']}: this option takes no object")
            _check(value, kinds, f"{option}.{name}")
        elif typed and name in hints:
            check_value(hints[name], value, f"{option}.{name}")


def _left_over(option: str, names: Sequence[str]) -> str:
    """What to say of options that an experiment has set for another choice of their group; empty if none has."""
    if not HydraConfig.initialized():  # the check before a sweep
        return ""
    runtime = HydraConfig.get().runtime
    folders = [Path(source.path) for source in runtime.config_sources if source.schema == "file"]
    for group, choice in runtime.choices.items():
        for path in (folder / group / f"{choice}.yaml" for folder in folders if group in OF_SEVERAL_GROUPS):
            node = OmegaConf.select(OmegaConf.load(path), option) if path.is_file() else None
            if left := [f"~{option}.{name}" for name in names if name in (node or {})]:
                own = f"its own choice of {option.partition('.')[0]}"
                return (
                    f". {group}={choice} sets it for {own}: add {' '.join(left)}, or choose another {group}"
                )
    return ""


def _classes(hint: Any) -> tuple[type, ...]:
    """The classes of which an annotation takes instances; none where it takes anything."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return tuple(m for m in members if inspect.isclass(m) and m not in (Any, object))


def check_value(hint: Any, value: Any, option: str) -> None:
    """Checks a value against a type annotation.

    Raises:
        UserError: it is of another type; says what is wanted.
    """
    from pydantic import TypeAdapter, ValidationError

    # Sequences come as lists; scalars are compared strictly, so that "3" or true is no number.
    strict = not isinstance(value, list)
    try:
        TypeAdapter(hint, config={"arbitrary_types_allowed": True}).validate_python(value, strict=strict)
    except ValidationError as error:
        # an annotation of several types has an error for each
        first, *others = dict.fromkeys(each["msg"] for each in error.errors())
        wanted = " or ".join(
            [f"{first[0].lower()}{first[1:]}", *(o.removeprefix("Input should be ") for o in others)]
        )
        raise UserError(f"{option}={value!r}: {wanted}") from None
