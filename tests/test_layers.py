"""Linear maps, with a derivative of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from re2tal_jax.backbones.layers import Linear


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5), ("bfloat16", 0.05)])
@pytest.mark.parametrize(("features", "out"), [(3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize("tokens", [(), (6,), (2, 3, 4)])
def test_a_linear_map_and_its_gradients_are_those_of_flax(tokens, features, out, dtype, tolerance):
    """The narrower side comes first in the derivative, whichever it is; parameters keep float32 but in float64."""
    with jax.enable_x64(dtype == "float64"):
        param_dtype = jnp.float64 if dtype == "float64" else jnp.float32
        make = lambda cls: cls(features, out, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))  # noqa: E731
        x = jax.random.normal(jax.random.key(1), (*tokens, features), dtype)

        def gradients(layer):
            graph, state = nnx.split(layer)

            def loss(state, x):
                y = nnx.merge(graph, state)(x)
                return jnp.sum(jnp.sin(y.astype(param_dtype))), y

            return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(state, x)

        got, expected = gradients(make(Linear)), gradients(make(nnx.Linear))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            np.testing.assert_allclose(a.astype(param_dtype), b.astype(param_dtype), rtol=tolerance, atol=tolerance)


def test_a_sharding_of_the_result_is_refused():
    layer = Linear(2, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="out_sharding"):
        layer(jnp.ones((1, 2)), out_sharding=jax.sharding.PartitionSpec())
