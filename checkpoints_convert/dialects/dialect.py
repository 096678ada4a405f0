"""A dialect: how one project names the parameters of one network in its files."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from checkpoints_convert.rules import Ignored, Rule, Rules, Shape

_AVERAGED = Ignored(r"n_averaged|steps", "the count of an averaging wrapper")  # of torch and of mmengine
PREPROCESSING = Ignored(
    r"(backbone\.model\.)?data_preprocessor\..*", "pixel mean and deviation; they are config.detector's"
)


def head(name: str) -> Ignored:
    """Return that a module of this name, at the root of a recogniser, is its classifier."""
    return Ignored(rf"(backbone\.model\.)?{re.escape(name)}\..*", "a classification head; features are taken before it")


@dataclass(frozen=True)
class Dialect:
    """The names that one project gives to a network.

    Args:
        name: what `--dialect` takes, unique in its family.
        family: beginning of the registered names of the networks it describes.
        about: one line: whose files these are.
        rules: in terms of the bare network, without `prefixes`.
        ignored: keys that become no parameter, with the reason.
        prefixes: what may stand before every key of the network; the first is written on the way back.
        options: arguments that the network must be built with for such files.
        computed: parameters of ours that such files do not hold because they are always the same, with the reason;
            they keep the value they are built with.
        constants: arrays that a strict load wants beside those of the rules, by key, made from the network and the
            keys that are written.
        sizes: options of ours that a file tells by its shapes, from PyTorch's shapes by our paths.
        note: what the user has to know because no key tells it.
        rewired: such files are of the rewired network; what they compute is compared with ours rewired.
        inflate: the file is of a network for images: its arrays are spread over time, and there is no way back.
    """

    name: str
    family: str
    about: str
    rules: Sequence[Rule]
    ignored: Sequence[Ignored] = ()
    prefixes: Sequence[str] = ("",)
    options: Mapping[str, Any] = field(default_factory=dict)
    computed: Mapping[str, str] = field(default_factory=dict)
    constants: Callable[[Any, Iterable[str]], Mapping[str, np.ndarray]] = lambda network, keys: {}
    sizes: Callable[[Mapping[str, Shape]], Mapping[str, Any]] = lambda shapes: {}
    note: str = ""
    rewired: bool = False
    inflate: bool = False

    @property
    def names(self) -> Rules:
        """The rules of the bare network."""
        return self.inside("")

    def inside(self, torch: str, ours: str = "") -> Rules:
        """Return the rules of the network where it is a part, called so, of a larger one."""
        return Rules(tuple(rule.prefixed(torch, ours) for rule in self.rules), (*self.ignored, _AVERAGED))
