"""How exact the reversible backward pass is; `python -m benchmarks.exactness [--out FILE.csv]`.

The chains are those of tests/test_reversible.py: 48 small branches, every other one of another kind, with drop path up
to 0.3 and generic inputs. Rows of the CSV: date, machine, versions, benchmark, setting, value, unit.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.rows import Row, append_rows
from re2tal_jax.diagnostics import diagnose_chain
from re2tal_jax.reversible import REWIRED, Wiring
from tests.test_reversible import gradients, inputs, make_chain

DEPTH = 48


def gradient_error() -> float:
    """Return the largest difference from autodiff of the same recurrence, relative to each array's largest value."""
    with jax.enable_x64(True):
        branches, (x, aux), key = make_chain(DEPTH, alternate=True), inputs(), jax.random.key(3)
        alpha, beta = jnp.zeros((), jnp.float64), jnp.ones((), jnp.float64)
        ours, theirs = (
            jax.tree.leaves(gradients(lambda a, b, r=r: Wiring(a, b, r), branches, x, aux, alpha, beta, key))
            for r in (True, False)
        )
        errors = [jnp.abs(a - b).max() / jnp.abs(b).max() for a, b in zip(ours, theirs, strict=True) if b.size]
        return float(jnp.stack(errors).max())


def reconstruction_error() -> float:
    """Return max |x - inverse(forward(x))| of bfloat16 branches between float32 states."""
    x, aux = inputs(64, jnp.float32)
    branches = make_chain(DEPTH, dtype=jnp.bfloat16, alternate=True)
    report = jax.jit(lambda b, x, key: diagnose_chain(REWIRED, b, x, key=key, aux=aux))
    return float(report(branches, x, jax.random.key(5)).reconstruction_error)


def main() -> None:
    """Print one line per figure and append them to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="CSV that the rows are appended to")
    options = parser.parse_args()
    rows: list[Row] = [
        ("gradients", f"{DEPTH} branches, float64, against autodiff", gradient_error(), "relative error"),
        ("reconstruction", f"{DEPTH} bfloat16 branches", reconstruction_error(), "largest error"),
    ]
    for benchmark, setting, value, unit in rows:
        print(f"{benchmark:15s} {setting:55s} {value:8.2g} {unit}")
    if options.out is not None:
        append_rows(options.out, rows, packages=("jax", "jaxlib"))


if __name__ == "__main__":
    main()
