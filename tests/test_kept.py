"""What a function keeps of its forward pass: no more than it names, and what is kept is not computed again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from re2tal_jax.backbones.layers import Mlp
from re2tal_jax.errors import ConfigError
from re2tal_jax.kept import call, keep, last_blocks
from re2tal_jax.reversible import REWIRED
from tests.parameters import drawn


def test_what_is_named_is_kept_and_arguments_are_given_again():
    def function(w, x):
        return jnp.sin(keep(x @ w)).sum()

    w, x = jnp.arange(6.0).reshape(2, 3), jnp.ones((4, 2))
    value, kept = call(function, w, x)
    assert value == function(w, x)
    (result,) = kept.results
    np.testing.assert_array_equal(result, x @ w)
    for got, want in zip(kept.pull(w, x)(1.0), jax.grad(function, argnums=(0, 1))(w, x), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_it_goes_through_a_scan():
    """One call an item; arguments that do not change are not stacked."""
    w, xs = jnp.eye(2) * 3, jnp.arange(6.0).reshape(3, 2)
    function = lambda w, x: jnp.sin(keep(w @ x))  # noqa: E731
    _, kept = jax.lax.scan(lambda carry, x: (carry, call(function, w, x)[1]), None, xs)
    assert [result.shape for result in kept.results] == [(3, 2)]

    def back(dw, item):
        x, kept = item
        return dw + kept.pull(w, x)(jnp.ones(2))[0], None

    dw, _ = jax.lax.scan(back, jnp.zeros_like(w), (xs, kept))
    want = jax.grad(lambda w: jax.vmap(function, (None, 0))(w, xs).sum())(w)
    np.testing.assert_allclose(dw, want, rtol=1e-6)


@pytest.mark.parametrize(("stored", "products"), [(0, 7), (1, 6)])
def test_a_stored_branch_computes_no_product_twice(stored, products):
    """An MLP: two products forward, four for gradients, and one more to undo it, as nobody asks for the start."""
    graph, state = nnx.split(drawn(lambda: Mlp(4, 8, dtype=jnp.float32, rngs=nnx.Rngs(0))))

    def loss(state, x):
        return jnp.sum(REWIRED.states([nnx.merge(graph, state)], x, stored=stored)[0] ** 2)

    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(state, jnp.ones((16, 4))).compile().as_text()
    assert program is not None
    assert program.count(" dot(") == products


@pytest.mark.parametrize(
    ("stored", "split"),
    [(0, (0, 0, 0)), (1, (0, 0, 1)), (2, (0, 0, 2)), (5, (0, 3, 2)), (6, (1, 3, 2)), (99, (2, 3, 2))],
)
def test_the_last_blocks_of_a_network_are_shared_out_to_its_chains(stored, split):
    assert last_blocks(stored, (2, 3, 2)) == split


def test_a_negative_number_of_blocks_is_refused():
    with pytest.raises(ConfigError, match=r"stored_blocks = -1: allowed is 0 .* or more"):
        last_blocks(-1, (2, 3))
