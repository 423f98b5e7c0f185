"""From a node of the configuration to an object, with the mistakes of its author told in one line.

Only classes of this project and of the libraries it is made of can be named by a `_target_`, and only where
an object of their kind belongs: a configuration may come from a stranger.
"""

import inspect
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.errors import UserError

T = TypeVar("T")

# Where classes may come from. The name under which an object is asked for is not enough: through
# torch.nn.modules.module.torch one reaches all of torch, so the resolved object's own module is checked too.
ALLOWED_PACKAGES = ("src.", "torch.optim.", "lightning.pytorch.")


class Environment:
    """The resolver `${oc.env:NAME}`, by which a secret may come into a configuration.

    What is written down (config.yaml, checkpoints, dashboards, folder names) keeps the text as it stands; only the
    constructors of the objects see the variable's value. The project's own DIFFUSION_LAB_* are no secrets.
    """

    OWN = "DIFFUSION_LAB_"

    def __init__(self) -> None:
        self._revealing = False
        self._used: dict[str, str] = {}

    def __call__(self, name: str, *default: Any) -> Any:
        if not self._revealing and not name.startswith(self.OWN):
            return self._text(name, *default)
        value = os.environ.get(name)
        if value is None:
            if not default:
                raise KeyError(f"environment variable {name} is not set")
            return default[0]
        if value and not name.startswith(self.OWN):
            self._used[value] = name
            folder = Path(os.path.expanduser(value))  # is told without its closing slash
            if folder != Path():
                self._used[str(folder)] = name
        return value

    @contextmanager
    def revealed(self) -> Iterator[None]:
        """Within it, variables are replaced by their values."""
        self._revealing = True
        try:
            yield
        finally:
            self._revealing = False

    def redacted(self, text: str) -> str:
        """The text with the names of variables in the place of the values that were looked up."""
        for value, name in sorted(
            self._used.items(), key=lambda item: -len(item[0])
        ):  # one may begin another
            text = text.replace(value, self._text(name))
        return text

    @staticmethod
    def _text(name: str, *default: Any) -> str:
        quoted = ",".join(f"'{value}'" for value in default)
        return f"${{oc.env:{name}{',' if quoted else ''}{quoted}}}"


_environment = Environment()
redacted = _environment.redacted
OmegaConf.register_new_resolver("oc.env", _environment, replace=True)


def build(node: DictConfig | None, kind: type[T], option: str, **joined: Any) -> T | Any:
    """The object that a configuration node describes.

    Args:
        node: has a `_target_`, the class, and its numbers; `_partial_: true` gives a functools.partial. Empty
            or None gives None.
        kind: what the object must be an instance of (or make, if partial).
        option: the node's place in the configuration, for messages.
        joined: built objects and derived numbers that the constructor gets besides the node's.

    Raises:
        UserError: an unknown or forbidden class, an unknown option, a wrong type or number.
    """
    if not node:
        return None
    with _environment.revealed():
        numbers = resolve(node, option)
    _check(numbers, (kind,), option)
    return _construct(numbers, option, joined)


def _construct(numbers: Mapping[str, Any], option: str, joined: Mapping[str, Any]) -> Any:
    arguments = {
        name: _construct(value, f"{option}.{name}", {}) if _is_node(value) else value
        for name, value in numbers.items()
        if name not in ("_target_", "_partial_")
    }
    make = partial(get_object(numbers["_target_"]), **arguments, **joined)
    if numbers.get("_partial_"):
        return make
    try:
        return make()
    except ValueError as error:
        raise UserError(f"{option}.{error}" if named(error) in arguments else f"{option}: {error}") from None


def named(error: ValueError) -> str:
    """The option that a mathematical room's error begins with, if it begins with one."""
    return re.split(r"[=,\s]", str(error), maxsplit=1)[0]


def _is_node(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def resolve(node: DictConfig, option: str) -> dict[str, Any]:
    """The node as plain dictionaries, interpolations filled in; `${oc.env:...}` stays text (see `Environment`).

    Raises:
        UserError: an interpolation leads nowhere, or a value is missing.
    """
    try:
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{option}: {str(error).splitlines()[0]}") from None


def _check(numbers: Mapping[str, Any], kinds: tuple[type, ...], option: str) -> None:
    """Holds a node, and the nodes below it, against what is allowed where it stands."""
    name = numbers.get("_target_")
    if not isinstance(name, str):
        raise UserError(f"{option} needs a _target_, the name of a class; choose one of the group's files")
    if not name.startswith(ALLOWED_PACKAGES):
        raise UserError(
            f"{option}._target_={name} is not allowed: classes come from {', '.join(ALLOWED_PACKAGES)}"
        )
    try:
        target = get_object(name)
    except Exception:
        raise UserError(f"{option}._target_={name} does not exist") from None
    home = f"{getattr(target, '__module__', None)}."
    if not inspect.isclass(target) or not home.startswith(ALLOWED_PACKAGES):
        raise UserError(
            f"{option}._target_={name} is not allowed: it is no class of {', '.join(ALLOWED_PACKAGES)}"
        )
    if not issubclass(target, kinds):
        raise UserError(f"{option}._target_={name} is no {' or '.join(kind.__name__ for kind in kinds)}")
    _check_values(target, numbers, option)


def _check_values(target: type, numbers: Mapping[str, Any], option: str) -> None:
    parameters = inspect.signature(target.__init__).parameters
    # object's own takes anything only to refuse it
    open_ended = target.__init__ is not object.__init__ and any(
        p.kind is p.VAR_KEYWORD for p in parameters.values()
    )
    typed = target.__module__.startswith(("src.", "torch.optim."))
    try:
        hints = get_type_hints(target.__init__)
    except NameError:  # some libraries name types that are there for type checkers only
        hints = {}
    for name, value in numbers.items():
        if name in ("_target_", "_partial_"):
            continue
        if name not in parameters and not open_ended:
            known = ", ".join(p for p in parameters if p not in ("self", "args", "kwargs"))
            raise UserError(
                f"{option}.{name}: {target.__name__} has no such option; it has {known or 'none'}"
            )
        if _is_node(value):
            kinds = _classes(hints.get(name))
            if not kinds:
                raise UserError(f"{option}.{name}._target_={value['_target_']}: no object belongs here")
            _check(value, kinds, f"{option}.{name}")
        elif typed and name in hints:
            check_value(hints[name], value, f"{option}.{name}")


def _classes(hint: Any) -> tuple[type, ...]:
    """The classes of which an annotation takes instances; none where it takes anything."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return tuple(m for m in members if inspect.isclass(m) and m not in (Any, object))


def check_value(hint: Any, value: Any, option: str) -> None:
    """Holds a value against a type annotation.

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


def check_scalars(config: DictConfig, kinds: Mapping[str, Any]) -> None:
    """Holds the options that belong to no group against their types.

    Raises:
        UserError: one is of another type, out of range or missing.
    """
    for option, kind in kinds.items():
        if OmegaConf.is_missing(config, option):
            raise UserError(f"{option} is missing: say {option}=...")
        check_value(kind, OmegaConf.select(config, option), option)
