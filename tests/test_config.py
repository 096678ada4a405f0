"""Sections of a config become arguments, or errors that say what to do."""

import functools
from dataclasses import dataclass
from typing import Literal

import pytest

from re2tal_jax.config import build
from re2tal_jax.errors import ConfigError
from re2tal_jax.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 1


@dataclass(frozen=True, kw_only=True)
class Options:
    learning_rate: float
    steps: int | None = None
    shape: tuple[int, int] = (1, 2)
    names: tuple[str, ...] = ()
    mode: Literal["fast", "exact"] = "fast"
    inner: Inner = Inner()

    def __post_init__(self):
        if self.learning_rate < 0:
            raise ValueError(f"learning_rate = {self.learning_rate} must not be negative")


def test_values_are_converted_to_the_annotated_types():
    options = build(Options, {"learning_rate": 1, "shape": [3, 4], "names": ["a"], "inner": {"size": 7}}, path="c")
    assert options == Options(learning_rate=1.0, shape=(3, 4), names=("a",), inner=Inner(size=7))
    assert isinstance(options.learning_rate, float)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"learning_rat": 1.0}, r"Unknown key c\.learning_rat\. Did you mean 'learning_rate'\?"),
        ({}, r"c lacks learning_rate: add it to the config file"),
        ({"learning_rate": "fast"}, r"c\.learning_rate = 'fast' has type str; expected float"),
        ({"learning_rate": True}, r"c\.learning_rate = True has type bool; expected float"),
        ({"learning_rate": 1.0, "steps": 1.5}, r"c\.steps = 1\.5 has type float; expected int"),
        ({"learning_rate": 1.0, "steps": True}, r"c\.steps = True has type bool; expected int"),
        ({"learning_rate": 1.0, "shape": (1, 2, 3)}, r"c\.shape = \(1, 2, 3\) has 3 items; expected 2"),
        ({"learning_rate": 1.0, "shape": 3}, r"c\.shape = 3 has type int; expected a tuple"),
        ({"learning_rate": 1.0, "names": (1,)}, r"c\.names\[0\] = 1 has type int; expected str"),
        ({"learning_rate": 1.0, "mode": "fsat"}, r"c\.mode = 'fsat' is not allowed\. Did you mean 'fast'\?"),
        ({"learning_rate": 1.0, "inner": {"sise": 1}}, r"Unknown key c\.inner\.sise\. Did you mean 'size'\?"),
        ({"learning_rate": -1.0}, r"c: learning_rate = -1\.0 must not be negative"),
    ],
)
def test_errors_name_key_value_and_what_is_allowed(section, message):
    with pytest.raises(ConfigError, match=message):
        build(Options, section, path="c")


def test_arguments_that_the_program_gives_are_not_config_keys():
    def factory(*, width: int, rngs: object) -> tuple:
        return width, rngs

    assert build(factory, {"width": 2}, path="c", rngs="r") == (2, "r")
    with pytest.raises(ConfigError, match=r"Unknown key c\.rngs"):
        build(factory, {"width": 2, "rngs": 1}, path="c", rngs="r")


def test_partial_factories_show_their_defaults():
    assert build(functools.partial(Options, learning_rate=0.5), {"steps": 3}, path="c").steps == 3


def test_unknown_names_of_a_registry_name_the_nearest():
    registry = Registry("backbone", {"video_swin_tiny": dict})
    with pytest.raises(ConfigError, match=r"Unknown backbone 'vido_swin_tiny'\. Did you mean 'video_swin_tiny'\?"):
        registry["vido_swin_tiny"]
    with pytest.raises(ConfigError, match=r"Unknown backbone 'x'\. Allowed: video_swin_tiny\."):
        registry["x"]
    assert list(registry) == ["video_swin_tiny"]


def test_a_name_registered_twice_is_refused():
    with pytest.raises(ValueError, match="two backbones are called 'a'"):
        Registry("backbone", {"a": dict}, {"a": dict})
