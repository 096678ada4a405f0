"""Strict configuration: a section of the config becomes the arguments of a dataclass or factory, or a clear error.

Nothing is hidden: every key a config holds must be known to what it configures, every value must have the
parameter's type, and defaults are what the signature shows.
"""

import ast
import contextlib
import dataclasses
import functools
import inspect
import traceback
import types
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar, Union

from ml_collections import ConfigDict

from re2tal_jax.errors import ConfigError, Re2TalError, did_you_mean

T = TypeVar("T")


def read_config_file(path: Path) -> dict[str, Any]:
    """Run a config file and return what its `get_config()` gives, as nested dictionaries.

    Raises:
        ConfigError: no such file, a file that fails (its line is named), or one without a config.
    """
    if not path.is_file():
        others = sorted(str(other) for other in path.parent.glob("*.py"))
        raise ConfigError(f"Config file {path} does not exist. {did_you_mean(str(path), others) if others else ''}")
    config = None
    try:
        module: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
        exec(compile(path.read_text(encoding="utf-8"), path, "exec"), module)
        if "get_config" in module:
            config = module["get_config"]()
        if isinstance(config, Mapping):
            config = ConfigDict(dict(config))
        if isinstance(config, ConfigDict):
            return config.to_dict()
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = frames[-1].lineno if frames else getattr(error, "lineno", None)
        where = "" if line is None else f" at line {line}"
        raise ConfigError(f"Config file {path} fails{where}: {type(error).__name__}: {error}") from error
    raise ConfigError(f"Config file {path} has no function get_config that returns a ConfigDict, but {config!r:.80}.")


def override(config: dict[str, Any], key: str, text: str) -> None:
    """Set one value of a config to what the command line says, `--config.<key>=<text>`.

    Python literals are read as such, and `true` and `false`; all else is text, and so is everything that replaces text
    but None and quoted values. A key that the file does not show may be set; `build` knows whether there is one.

    Raises:
        ConfigError: a section that there is not.
    """
    *sections, name = key.split(".")
    where, path = config, "config"
    for section in sections:
        if section not in where:
            words = did_you_mean(section, (k for k, v in where.items() if isinstance(v, dict)))
            raise ConfigError(f"Unknown key {path}.{section}. {words}")
        if not isinstance(where[section], dict):
            raise ConfigError(f"--config.{key}: {path}.{section} is {where[section]!r}, which has no keys.")
        where, path = where[section], f"{path}.{section}"
    where[name] = _read_value(text, isinstance(where.get(name), str))


def _read_value(text: str, replaces_text: bool) -> Any:
    if text in ("true", "false") and not replaces_text:
        return text == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if not replaces_text or value is None or isinstance(value, (str, tuple)) else text


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
    arguments = bind(factory, section, path=path, given=given)
    try:
        return factory(**arguments, **given)
    except Re2TalError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def bind(
    factory: Callable[..., Any], section: Mapping[str, Any], *, path: str, given: Collection[str] = ()
) -> dict[str, Any]:
    """Return the arguments with which `build` would call `factory`, without calling it; errors as there."""
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
    return arguments


def resolve(
    factory: Callable[..., Any], section: Mapping[str, Any], *, path: str, given: Collection[str] = ()
) -> dict[str, Any]:
    """Return a section with every default of the factory filled in; errors as `bind`."""
    arguments = bind(factory, section, path=path, given=given)
    parameters, _ = _signature(factory)
    return {
        name: arguments.get(name, parameter.default)
        for name, parameter in parameters.items()
        if name not in given and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


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
    if inspect.isclass(hint) and dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(hint, value, path=path)
    if origin is tuple:
        return _convert_tuple(value, hint, path)
    plain = origin or hint
    if plain is Mapping and isinstance(value, Mapping):
        key_hint, value_hint = typing.get_args(hint) or (Any, Any)
        return {
            _convert(k, key_hint, f"a key of {path}"): _convert(v, value_hint, f"{path}.{k}") for k, v in value.items()
        }
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if plain is int and isinstance(value, bool):
        raise ConfigError(f"{path} = {value!r} has type bool; expected int.")
    if inspect.isclass(plain) and not isinstance(value, plain):
        expected = getattr(plain, "__name__", str(plain))
        raise ConfigError(f"{path} = {value!r} has type {type(value).__name__}; expected {expected}.")
    return value


def _convert_union(value: Any, hint: Any, path: str) -> Any:
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    if value is None and len(options) < len(typing.get_args(hint)):
        return None
    if len(options) == 1:
        return _convert(value, options[0], path)
    for option in options:
        with contextlib.suppress(ConfigError):
            return _convert(value, option, path)
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
