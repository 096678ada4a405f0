"""End-to-end temporal action localization on long videos, through reversible backbones, in JAX."""
