"""Localizers: all behind the backbone, from snippet features to segments with class scores.

Every localizer is an `nnx.Module`, constructed as `(in_channels, num_classes, *, …, dtype, rngs)`, and offers

    initial_state() -> pytree of arrays
        what training carries beside the parameters (a moving normaliser); never stored in the module.
    __call__(features (B, T, C), mask (B, T), *, key=None) -> outputs
        a pytree of its own kind. `mask` is True at real snippets; a key turns dropout on, None is evaluation.
    loss(outputs, gt_segments (B, N, 2), gt_labels (B, N), gt_mask (B, N), state, *, train) -> (losses, new state)
        a dict of float32 scalars whose "total" is minimised. Segments are in snippets; any N, also 0, and rows
        whose `gt_mask` is False, whatever they hold, count as absent.
    decode(outputs) -> proposals (B, P, 2) in snippets, scores (B, P, K) in [0, 1], valid (B, P)

All of them are pure, have static shapes, work under `jax.jit`, and give finite values and gradients for every mask,
also for a sample without a single real snippet. Impossible settings raise ConfigError at construction.

To add one: a file with `VARIANTS` (name -> factory), and its line below; the contract tests run over
every entry.
"""

from typing import Any

from flax import nnx

from re2tal_jax.localizers import actionformer, vsgn
from re2tal_jax.registry import Registry

LOCALIZERS = Registry("localizer", actionformer.VARIANTS, vsgn.VARIANTS)


def list_localizers() -> list[str]:
    """Return the names that `build_localizer` and `config.localizer.name` take."""
    return sorted(LOCALIZERS)


def build_localizer(name: str, **kwargs: Any) -> nnx.Module:
    """Return a localizer by name; `kwargs` are its constructor's.

    Raises:
        ConfigError: unknown name (close match named), or settings that cannot run.
    """
    return LOCALIZERS[name](**kwargs)
