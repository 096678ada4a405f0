"""`--mode inspect --fit frames | batch | size | stored_blocks`: the largest training step that a device's memory holds.

Found by compiling, with few programs: memory is nearly linear in frames, batch and pixels, so two programs tell about
where the limit lies, and the others close in on it. Blocks that are stored are the other way to use memory: for time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from flax import nnx

from re2tal_jax.errors import ConfigError
from re2tal_jax.experiment import make_detector
from re2tal_jax.settings import Settings, SplitConfig

FITS = ("frames", "batch", "size", "stored_blocks")
MARGIN = 0.05
"""The part of a device's memory that is left to what no program's plan counts."""

_MOST = 2**10  # times the start: beyond it memory does not grow, or the limit is no device's
_LINES = 6  # programs after which the search halves: memory is then no line
_PIXELS = 32  # what the backbones shrink height and width by; patches of 16 divide it


@dataclass(frozen=True)
class Fit:
    """What a search found, in units of the quantity: 0 if nothing fits, and the least that is known not to fit.

    `too_large` is None if everything that was tried fits.
    """

    largest: int
    too_large: int | None


def largest_that_fits(
    needed: Callable[[int], int], limit: int, start: int, *, power: int = 1, most: int | None = None
) -> Fit:
    """Return the largest n >= 1 whose `needed(n)` bytes are at most `limit`.

    Args:
        needed: bytes of n, which costs a compilation; about linear in n**power, and never less for more.
        limit: bytes there are.
        start: the first n to be tried.
        power: 2 for the side of a square.
        most: there are no more, if given.
    """
    most = start * _MOST if most is None else most
    known = {start: needed(start)}
    low, high = (start, None) if known[start] <= limit else (0, start)
    while low < most if high is None else high - low > 1:
        n = min(_guess(known, limit, low, high, power), most)
        known[n] = needed(n)
        low, high = (n, high) if known[n] <= limit else (low, n)
    return Fit(low, high)


def _guess(known: dict[int, int], limit: int, low: int, high: int | None, power: int) -> int:
    """Return where a line through two known points meets the limit, kept between `low` and `high`."""
    if len(known) == 1:
        return 2 * low if high is None else high // 2
    if high is not None and len(known) >= _LINES:
        return (low + high) // 2
    if high is None:
        one, two = min(known), max(known)  # the two latest may need the same, padded
    elif low == 0:
        one, two = sorted(known)[:2]
    else:
        one, two = low, high
    slope = (known[two] - known[one]) / (two**power - one**power)
    reach = one**power + (limit - known[one]) / slope if slope > 0 else (2 * two) ** power
    n = math.floor(max(reach, 1.0) ** (1 / power))
    return min(max(n, low + 1), 64 * low if high is None else high - 1)


@dataclass(frozen=True)
class Quantity:
    """What is varied: `unit` frames, videos or pixels are the smallest step, `start` of them are in the config."""

    name: str
    unit: int
    start: int
    power: int
    apply: Callable[[int], Settings]
    most: int | None = None

    def describe(self, n: int) -> str:
        """Return n units in words."""
        if self.name == "size":
            height, width = _seen(self.apply(n).train)
            return f"{height} x {width} pixels"
        if self.name == "stored_blocks":
            return f"{n} stored block{'s' if n != 1 else ''}"
        return f"{n * self.unit:,} {'frames' if self.name == 'frames' else 'videos a batch'}"


def quantity(name: str, settings: Settings, devices: int) -> Quantity:
    """Return how a config is varied, in steps that its model and the devices accept.

    Raises:
        ConfigError: it has nothing of the kind.
    """
    if name == "stored_blocks":
        most = _stored(settings)
        return Quantity(name, 1, most, 1, lambda n: _store(settings, n), most)
    if name == "batch":
        unit = devices * settings.optimizer.accumulate
        return Quantity(name, unit, _units(settings.train.batch_size, unit), 1, lambda n: _batch(settings, n * unit))
    if name == "frames":
        unit = _snippet_step(settings)
        start = _units(settings.num_snippets, unit)
        frames = unit * settings.frames_per_snippet
        return Quantity(name, frames, start, 1, lambda n: _snippets(settings, n * unit))
    side = min(_seen(settings.train))
    return Quantity(name, _PIXELS, _units(side, _PIXELS), 2, lambda n: _size(settings, n * _PIXELS / side))


def _seen(split: SplitConfig) -> tuple[int, int]:
    """Return height and width of the frames that the backbone takes."""
    if split.augment is None:
        raise ConfigError("--fit size: this config trains on features, which have no size; take frames or batch.")
    return split.augment.height, split.augment.width


def _units(value: int, unit: int) -> int:
    return max(1, round(value / unit))


def _snippet_step(settings: Settings) -> int:
    """Return what lengths are multiples of: what the localizer pads to beyond the config's length."""
    localizer = nnx.eval_shape(make_detector(settings)).localizer
    padded = localizer.padded_length(settings.num_snippets)
    return localizer.padded_length(padded + 1) - padded


def _batch(settings: Settings, size: int) -> Settings:
    return replace(settings, train=replace(settings.train, batch_size=size))


def _stored(settings: Settings) -> int:
    """Return how many blocks the backbone could store: of those that it would recompute."""
    if settings.from_features or not settings.backbone.get("rewired", True):
        raise ConfigError(
            "--fit stored_blocks: this config has no reversible backbone, nothing is recomputed; take frames or batch."
        )
    every = _store(settings, 2**30)
    if not (most := sum(nnx.eval_shape(make_detector(every)).backbone.stored_blocks)):
        raise ConfigError("--fit stored_blocks: this backbone has no chain to store blocks of; take frames or batch.")
    return most


def _store(settings: Settings, blocks: int) -> Settings:
    return replace(settings, backbone={**settings.backbone, "stored_blocks": blocks})


def _snippets(settings: Settings, count: int) -> Settings:
    """Return settings of so many snippets; a localizer whose length is the config's follows it."""
    localizer = dict(settings.localizer)
    length = localizer.get("max_seq_len")
    if length is not None:
        localizer["max_seq_len"] = count if length == settings.num_snippets else max(length, count)
    return replace(settings, num_snippets=count, localizer=localizer)


def _size(settings: Settings, scale: float) -> Settings:
    """Return settings whose frames are so many times as high and wide, as they are stored and as they are seen."""

    def scaled(split: SplitConfig) -> SplitConfig:
        height, width = (_units(round(side * scale), _PIXELS) * _PIXELS for side in _seen(split))
        stored = [max(1, round(side * scale)) for side in split.loader.frame_shape]
        assert split.augment is not None  # _seen
        augment = replace(split.augment, height=height, width=width)
        return replace(split, augment=augment, loader=replace(split.loader, height=stored[0], width=stored[1]))

    return replace(settings, train=scaled(settings.train))
