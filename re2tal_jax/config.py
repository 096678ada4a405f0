"""Strict configuration: a section of the config becomes the arguments of a dataclass or factory, or a clear error.

Nothing is hidden: every key a config holds must be known to what it configures, every value must have the
parameter's type, and defaults are what the signature shows.
"""

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, Union

from re2tal_jax.errors import ConfigError, did_you_mean

T = TypeVar("T")


def build(factory: Callable[..., T], section: Mapping[str, Any], *, path: str, **given: Any) -> T:
    """Call `factory` with a config section, after checking every key and value against its signature.

    Args:
        factory: a dataclass, class or function; its annotations say what each key may hold.
        section: the keys and values, nested mappings for parameters that are dataclasses themselves.
        path: how errors name the section, for example "config.training".
        given: arguments that the program supplies; the section may not set them.

    Raises:
        ConfigError: unknown key (nearest match named), missing key, value of the wrong type, or a
            ValueError of the factory itself, prefixed with `path`.
    """
    parameters, hints = _signature(factory)
    allowed = {
        name: p
        for name, p in parameters.items()
        if name not in given and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    arguments = {}
    for key, value in section.items():
        if key not in allowed:
            raise ConfigError(f"Unknown key {path}.{key}. {did_you_mean(key, allowed)}")
        hint = hints.get(key, allowed[key].annotation)
        arguments[key] = _convert(value, hint, f"{path}.{key}")
    missing = [k for k, p in allowed.items() if p.default is p.empty and k not in arguments]
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(missing)}: add it to the config file.")
    try:
        return factory(**arguments, **given)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def _signature(factory: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """Return parameters and type hints of a function, class, or functools.partial of one."""
    bound: dict[str, Any] = {}
    while isinstance(factory, functools.partial):
        bound = {**factory.keywords, **bound}
        factory = factory.func
    function = factory
    if inspect.isclass(factory):  # not inspect.signature(class): a metaclass may hide the constructor's
        function = factory.__init__
    parameters = dict(inspect.signature(function).parameters)
    if inspect.isclass(factory):
        parameters.pop("self")
    for name, value in bound.items():
        parameters[name] = parameters[name].replace(default=value)
    return parameters, typing.get_type_hints(function)


def _convert(value: Any, hint: Any, path: str) -> Any:
    """Return `value` as `hint` wants it (list to tuple, int to float, mapping to dataclass), or raise."""
    if hint in (Any, inspect.Parameter.empty):
        return value
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(value, hint, path)
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ConfigError(f"{path} = {value!r} is not allowed. {did_you_mean(str(value), map(str, choices))}")
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(hint, value, path=path)
    if origin is tuple:
        return _convert_tuple(value, hint, path)
    plain = origin or hint
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if plain is int and isinstance(value, bool):
        raise ConfigError(f"{path} = {value!r} has type bool; expected int.")
    if inspect.isclass(plain) and not isinstance(value, plain):
        expected = getattr(plain, "__name__", str(plain))
        raise ConfigError(f"{path} = {value!r} has type {type(value).__name__}; expected {expected}.")
    return value


def _convert_union(value: Any, hint: Any, path: str) -> Any:
    options = typing.get_args(hint)
    if value is None and type(None) in options:
        return None
    for option in options:
        if option is type(None):
            continue
        try:
            return _convert(value, option, path)
        except ConfigError as error:
            last = error
    if len([o for o in options if o is not type(None)]) == 1:
        raise last
    names = " or ".join(getattr(o, "__name__", str(o)) for o in options)
    raise ConfigError(f"{path} = {value!r} has type {type(value).__name__}; expected {names}.")


def _convert_tuple(value: Any, hint: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{path} = {value!r} has type {type(value).__name__}; expected a tuple.")
    items = typing.get_args(hint)
    if len(items) == 2 and items[1] is Ellipsis:
        return tuple(_convert(v, items[0], f"{path}[{i}]") for i, v in enumerate(value))
    if items and len(items) != len(value):
        raise ConfigError(f"{path} = {value!r} has {len(value)} items; expected {len(items)}.")
    return tuple(_convert(v, h, f"{path}[{i}]") for i, (v, h) in enumerate(zip(value, items, strict=True)))
