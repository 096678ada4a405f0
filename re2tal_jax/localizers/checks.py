"""Settings and inputs that a localizer cannot run with, refused with the values and the fix (ConfigError)."""

import math

from jaxtyping import Array

from re2tal_jax.errors import ConfigError


def check_inputs(features: Array, mask: Array, in_channels: int) -> None:
    """Refuse features (B, T, C) of another width and a mask of another shape."""
    if features.ndim != 3 or features.shape[-1] != in_channels or mask.shape != features.shape[:2]:
        raise ConfigError(
            f"features {features.shape} with mask {mask.shape}: expected (B, T, {in_channels}) with (B, T)."
            " Set the localizer's in_channels to the backbone's channels."
        )


def level_windows(window: int | tuple[int, ...], arch: tuple[int, int, int]) -> tuple[int, ...]:
    """Return the window of every level."""
    if len(arch) != 3 or min(arch) < 0:
        raise ConfigError(
            f"arch = {arch!r}: expected three numbers >= 0, of embedding convolutions, stem blocks and strided blocks."
        )
    levels = 1 + arch[2]
    windows = (window,) * levels if isinstance(window, int) else tuple(window)
    if len(windows) != levels:
        raise ConfigError(f"window = {window!r} has {len(windows)} entries; arch = {arch!r} makes {levels} levels.")
    for w in windows:
        if w != -1 and (w < 3 or w % 2 == 0):
            nearest = max(3, w + 1 if w % 2 == 0 else w)
            raise ConfigError(f"window = {w}: expected -1 (global) or an odd number >= 3, for example {nearest}.")
    return windows


def divisor_of_lengths(strides: tuple[int, ...], windows: tuple[int, ...], max_seq_len: int) -> int:
    """Return what padded lengths are multiples of: whole strides, and pairs of half windows where attention is local.

    The least common multiple of the levels' factors; the published code takes their maximum, which is the same unless
    it fails on its own assertions.
    """
    factors = [s * 2 * (w // 2) if w > 1 else s for s, w in zip(strides, windows, strict=True)]
    whole = math.lcm(*factors)
    for level, factor in enumerate(factors):
        if max_seq_len % factor:
            raise ConfigError(
                f"max_seq_len = {max_seq_len} is no multiple of {factor}, which level {level} needs (stride"
                f" {strides[level]}, window {windows[level]}). Use a multiple of {whole}, for example"
                f" {-(-max_seq_len // whole) * whole}, or other windows or fewer levels."
            )
    return whole


def check_architecture(
    in_channels: int,
    channels: int,
    arch: tuple[int, int, int],
    num_heads: int,
    kernel_size: int,
    scale_factor: int,
    head_convs: int,
    head_channels: int | None,
) -> None:
    """Refuse widths, heads and kernels that do not fit together."""
    if min(in_channels, channels, num_heads) < 1 or channels % num_heads:
        raise ConfigError(
            f"channels = {channels} cannot be divided among num_heads = {num_heads} (in_channels = {in_channels}):"
            " all have to be positive, channels a multiple of num_heads."
        )
    if arch[0] == 0 and in_channels != channels:
        raise ConfigError(
            f"arch = {arch!r} has no embedding convolution to turn in_channels = {in_channels} into channels ="
            f" {channels}. Use arch[0] >= 1 or channels = {in_channels}."
        )
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ConfigError(f"kernel_size = {kernel_size}: expected an odd number, for example {kernel_size + 1}.")
    if scale_factor < 2 or scale_factor % 2:
        raise ConfigError(f"scale_factor = {scale_factor}: expected an even number, for example 2.")
    if head_channels is not None and head_channels < 1:
        raise ConfigError(f"head_channels = {head_channels}: expected a positive number, or None for channels.")
    if head_convs < 0 or (head_convs == 0 and head_channels not in (None, channels)):
        raise ConfigError(
            f"head_convs = {head_convs} with head_channels = {head_channels}: expected at least one convolution to"
            f" change the width from channels = {channels}."
        )


def check_targets(
    num_classes: int,
    regression_range: tuple[tuple[float, float], ...],
    num_levels: int,
    prior_prob: float,
    center_sample_radius: float,
) -> None:
    """Refuse settings of classes and targets that no loss can be computed from."""
    if num_classes < 1:
        raise ConfigError(f"num_classes = {num_classes}: expected at least 1.")
    if len(regression_range) != num_levels:
        raise ConfigError(
            f"regression_range has {len(regression_range)} entries {regression_range!r}; there are {num_levels} levels"
            f" (1 + arch[2]). Give one (shortest, longest) per level."
        )
    for limits in regression_range:
        if len(limits) != 2 or not 0 <= limits[0] < limits[1]:
            raise ConfigError(
                f"regression_range entry {limits!r}: expected (shortest, longest), 0 <= shortest < longest."
            )
    if not 0 <= prior_prob < 1:
        raise ConfigError(f"prior_prob = {prior_prob}: expected a probability in [0, 1); 0 leaves the bias at zero.")
    if not center_sample_radius > 0:
        raise ConfigError(f"center_sample_radius = {center_sample_radius}: expected a positive number of strides.")


def check_rates(**rates: float) -> None:
    """Refuse probabilities outside [0, 1)."""
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ConfigError(f"{name} = {rate}: expected a number in [0, 1).")


def check_positive(**values: float) -> None:
    """Refuse numbers that are not above zero, or infinite."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{name} = {value}: expected a positive number.")
