"""What a function keeps of its forward pass: no more than it names, and what is kept is not computed again."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from re2tal_jax.backbones import vit_block
from re2tal_jax.backbones.layers import Mlp
from re2tal_jax.backbones.resnet3d import Bottleneck
from re2tal_jax.backbones.swin_block import AttentionBranch, Grid, WindowAttention
from re2tal_jax.errors import ConfigError
from re2tal_jax.kept import call, keep
from re2tal_jax.reversible import REWIRED, Wiring
from re2tal_jax.stored import last_blocks
from re2tal_jax.tiling import prepare
from tests.parameters import drawn
from tests.test_reversible import inputs, make_chain


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


GRID = Grid((4, 4, 4), (4, 4, 4), 2**20)
BRANCHES = {
    "window attention": (
        lambda **named: AttentionBranch(WindowAttention(8, 2, (2, 4, 4), True, True, **named), GRID),
        (1, 4, 4, 4, 8),
        {(2, 2, 32, 1): 1, (2, 2, 32, 4): 4},
    ),
    "attention": (
        lambda **named: vit_block.AttentionBranch(vit_block.Attention(8, 2, True, 1e-6, **named), 2**20),
        (1, 3, 5, 8),
        {(1, 1, 3, 2, 5, 1): 1, (1, 1, 3, 2, 5, 4): 4},
    ),
    "attention, a head at a time": (
        lambda **named: vit_block.AttentionBranch(vit_block.Attention(8, 2, True, 1e-6, **named), 25),
        (1, 3, 5, 8),
        {(2, 1, 3, 1, 5, 1): 1, (2, 1, 3, 1, 5, 4): 4},
    ),
    "MLP": (lambda **named: Mlp(8, 32, **named), (1, 3, 5, 8), {(1, 3, 5, 32): 1}),
    "bottleneck": (
        lambda **named: Bottleneck(8, 2, inflate=True, **named),
        (1, 3, 4, 4, 8),
        {(1, 3, 4, 4, 2): 2, (1, 3, 4, 4, 8): 1},
    ),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_branches_keep_results_of_products_and_no_weights_of_attention(name):
    """In bfloat16: no parameter is among them, as it is or cast; float32 are sums and what an average is made of."""
    make, shape, expected = BRANCHES[name]
    branch = nnx.eval_shape(lambda: make(dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))

    def run(branch, x):
        return call(lambda branch, x: branch(x, key=None, aux=None), prepare(branch), x)[1].results

    results = jax.eval_shape(run, branch, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert Counter(result.shape for result in results if result.size > 8) == expected


@pytest.mark.parametrize("traced", [False, True], ids=["constant", "traced"])
@pytest.mark.parametrize("alternate", [False, True], ids=["period 1", "period 2"])
def test_a_stored_branch_costs_one_state_beside_what_it_keeps(alternate, traced):
    """These keep nothing; coefficients that are differentiated store nothing more."""

    def temporaries(depth):
        branches, (x, _) = make_chain(depth, alternate=alternate, dtype=jnp.float32), inputs(4096, jnp.float32)

        def loss(branches, x, beta):
            return jnp.sum(Wiring(0.0, beta if traced else 1.0)(branches, x, stored=depth) ** 2)

        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(branches, x, jnp.float32(1)).compile()
        stats = program.memory_analysis()
        assert stats is not None
        return stats.temp_size_in_bytes / x.nbytes

    per_branch = (temporaries(24) - temporaries(8)) / 16
    assert per_branch == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("stored", "split"),
    [(0, (0, 0, 0)), (1, (0, 0, 1)), (2, (0, 0, 2)), (5, (0, 3, 2)), (6, (1, 3, 2)), (99, (2, 3, 2))],
)
def test_the_last_blocks_of_a_network_are_shared_out_to_its_chains(stored, split):
    assert last_blocks(stored, (2, 3, 2)) == split


def test_a_negative_number_of_blocks_is_refused():
    with pytest.raises(ConfigError, match=r"stored_blocks = -1: allowed is 0 .* or more"):
        last_blocks(-1, (2, 3))
    with pytest.raises(ConfigError, match=r"stored = -1 branches: allowed is 0 .* or more"):
        REWIRED(make_chain(2, dtype=jnp.float32), jnp.ones((1, 8)), stored=-1)
