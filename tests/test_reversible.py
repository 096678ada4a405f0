"""The chain: gradients against autodiff of the same recurrence, exact inversion, and memory that does not grow."""

import functools
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from re2tal_jax.diagnostics import diagnose, diagnose_chain
from re2tal_jax.exact import GRID, at_least_float32, to_grid, widen
from re2tal_jax.reversible import PLAIN, REWIRED, Wiring, rewire
from tests import quick

WIDTH = 8


class Residual(nnx.Module):
    """A small residual function with everything a branch may have: a mask, drop path and a dtype of its own."""

    def __init__(self, rate: float, activation, *, dtype=jnp.float64, hidden: int = 12, rngs: nnx.Rngs):
        param_dtype = jnp.float64 if dtype == jnp.float64 else jnp.float32
        self.up = nnx.Linear(WIDTH, hidden, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.down = nnx.Linear(hidden, WIDTH, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.rate = nnx.data(jnp.asarray(rate, param_dtype))
        self.activation = activation
        self.dtype = dtype

    def __call__(self, x, *, key, aux):
        y = self.down(self.activation(self.up(x.astype(self.dtype))))
        if aux is not None:
            y = y * aux["scale"].astype(y.dtype) * aux["mask"].astype(y.dtype)
        if key is not None:
            keep = jax.random.bernoulli(key, 1 - self.rate, (x.shape[0], 1))
            y = y * keep.astype(y.dtype) / (1 - self.rate).astype(y.dtype)
        return y


def make_chain(depth: int, *, alternate: bool = False, **kwargs) -> list[Residual]:
    """`alternate`: two kinds of branches in turn, so that the pattern scanned has period two."""
    rngs = nnx.Rngs(0)
    activations = [jnp.tanh, jax.nn.silu] if alternate else [jnp.tanh]
    return [Residual(0.3 * i / depth, activations[i % len(activations)], rngs=rngs, **kwargs) for i in range(depth)]


def inputs(batch: int = 8, dtype=jnp.float64):
    x = jax.random.normal(jax.random.key(1), (batch, WIDTH), dtype)
    aux = {
        "scale": jax.random.normal(jax.random.key(2), (batch, 1), dtype),
        "mask": jnp.arange(batch)[:, None] % 3 > 0,
    }
    return x, aux


def gradients(wiring_of, branches, x, aux, alpha, beta, key, stored=0):
    def loss(branches, x, scale, alpha, beta):
        aux_inputs = {"scale": scale, "mask": aux["mask"]}
        y = wiring_of(alpha, beta)(branches, x, key=key, aux=aux_inputs, stored=stored)
        return jnp.sum(jnp.sin(3 * y))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4)))(branches, x, aux["scale"], alpha, beta)


def assert_trees_close(got, want, tolerance):
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize(
    ("depth", "alternate", "stored"),
    [
        (1, False, 0),
        (7, False, 0),
        (6, True, 0),
        (5, True, 0),
        (1, False, 1),
        (7, True, 3),
        (6, True, 6),
        (5, False, 9),
    ],
)
@pytest.mark.parametrize("coefficients", [(0.0, 1.0), (0.4, 0.7)], ids=["re2tal", "dr2net"])
def test_rewired_gradient_equals_plain_autodiff(depth, alternate, stored, coefficients):
    """Of branches, input, auxiliary inputs and both coefficients, under jit, with drop path up to 0.3."""
    with jax.enable_x64(True):
        branches, (x, aux) = make_chain(depth, alternate=alternate), inputs()
        alpha, beta = (jnp.asarray(c, jnp.float64) for c in coefficients)
        key = jax.random.key(3)
        got = gradients(lambda a, b: Wiring(a, b, True), branches, x, aux, alpha, beta, key, stored)
        want = gradients(lambda a, b: Wiring(a, b, False), branches, x, aux, alpha, beta, key)
        assert_trees_close(got, want, 1e-10)
        assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(want[1][1:]))


def test_stored_branches_of_low_precision_give_the_same_bits():
    x, aux = inputs(16, jnp.float32)
    branches = make_chain(6, dtype=jnp.bfloat16)

    def run(stored):
        loss = lambda x: jnp.sum(REWIRED(branches, x, key=jax.random.key(3), aux=aux, stored=stored) ** 2)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(x)

    for got, want in zip(run(4), run(0), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("stored", [0, 4])
def test_gradient_on_eight_devices_equals_plain_autodiff_on_one(stored):
    with jax.enable_x64(True):
        branches, (x, aux) = make_chain(6, alternate=True), inputs()
        alpha, beta = jnp.zeros((), jnp.float64), jnp.ones((), jnp.float64)
        key = jax.random.key(3)
        want = gradients(lambda a, b: Wiring(a, b, False), branches, x, aux, alpha, beta, key)
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        x, aux = jax.device_put((x, aux), NamedSharding(mesh, PartitionSpec("data")))
        got = gradients(lambda a, b: Wiring(a, b, True), branches, x, aux, alpha, beta, key, stored)
        assert_trees_close(got, want, 1e-10)


def test_wiring_gives_the_recurrence():
    """Three branches by hand: s_{i+1} = F(s_i) + alpha s_i + beta s_{i-1}, merged by (s_3 + beta s_2) / (1 + beta)."""
    with jax.enable_x64(True):
        f, (x, _) = make_chain(3), inputs()
        alpha, beta = 0.25, 0.5
        previous, state = x, x
        for branch in f:
            previous, state = state, branch(state, key=None, aux=None) + alpha * state + beta * previous
        np.testing.assert_allclose(Wiring(alpha, beta)(f, x), (state + beta * previous) / (1 + beta), rtol=1e-12)


def test_plain_wiring_is_the_ordinary_residual_network():
    with jax.enable_x64(True):
        f, (x, _) = make_chain(3), inputs()
        y = x
        for branch in f:
            y = y + branch(y, key=None, aux=None)
        np.testing.assert_allclose(PLAIN(f, x), y, rtol=1e-12)


def test_two_branches_rewired_are_the_published_pair_form():
    """y1 = x1 + F(x2), y2 = x2 + G(y1) with both streams equal at the start, output their mean (Re2TAL eq. 2)."""
    with jax.enable_x64(True):
        (f, g), (x, _) = make_chain(2), inputs()
        y1 = x + f(x, key=None, aux=None)
        y2 = x + g(y1, key=None, aux=None)
        np.testing.assert_allclose(REWIRED([f, g], x), (y1 + y2) / 2, rtol=1e-12)


class Rectified(Residual):
    """A block that is ordinarily relu(x + f(x)): rewired, F = relu(f)."""

    def __call__(self, x, *, key, aux):
        return jax.nn.relu(super().__call__(x, key=key, aux=aux))

    def ordinary(self, x, shortcut, *, key, aux):
        return jax.nn.relu(shortcut + Residual.__call__(self, x, key=key, aux=aux).astype(shortcut.dtype))


def rectified_chain(depth: int, dtype=jnp.float64) -> list[Rectified]:
    rngs = nnx.Rngs(0)
    return [Rectified(0.0, jnp.tanh, dtype=dtype, rngs=rngs) for _ in range(depth)]


def test_plain_wiring_runs_the_ordinary_form_of_branches_that_have_one():
    with jax.enable_x64(True):
        (f, g), last, (x, _) = rectified_chain(2), make_chain(1)[0], inputs()
        y = x
        for branch in (f, g):
            y = jax.nn.relu(y + Residual.__call__(branch, y, key=None, aux=None))
        y = y + last(y, key=None, aux=None)  # one without such a form is F(x) + x
        np.testing.assert_allclose(PLAIN([f, g, last], x), y, rtol=1e-12)
        assert not np.allclose(y, Wiring(0.0, 1.0, reversible=False)([f, g, last], x))


def test_all_but_the_plain_wiring_run_the_recurrence_of_branches_with_an_ordinary_form():
    """Traced coefficients are not known to be 1 and 0, and the rewired chain never needs the ordinary form."""
    with jax.enable_x64(True):
        f, (x, _) = rectified_chain(3), inputs()

        def recurrence(alpha, beta):
            previous, state = x, x
            for branch in f:
                previous, state = state, branch(state, key=None, aux=None) + alpha * state + beta * previous
            return (state + beta * previous) / (1 + beta)

        traced = jax.jit(lambda alpha, beta: Wiring(alpha, beta, reversible=False)(f, x))(1.0, 0.0)
        np.testing.assert_allclose(traced, recurrence(1.0, 0.0), rtol=1e-12)
        np.testing.assert_allclose(Wiring(1.0, 0.5, reversible=False)(f, x), recurrence(1.0, 0.5), rtol=1e-12)
        np.testing.assert_allclose(REWIRED(f, x), recurrence(0.0, 1.0), rtol=1e-12)
        assert not np.allclose(PLAIN(f, x), traced)


def test_plain_gradient_goes_through_the_ordinary_form():
    with jax.enable_x64(True):
        f, (x, _) = rectified_chain(4), inputs()

        def by_hand(branches, x):
            for branch in branches:
                x = branch.ordinary(x, x, key=None, aux=None)
            return jnp.sum(jnp.sin(x))

        got = jax.jit(jax.grad(lambda f, x: jnp.sum(jnp.sin(PLAIN(f, x))), argnums=(0, 1)))(f, x)
        assert_trees_close(got, jax.grad(by_hand, argnums=(0, 1))(f, x), 1e-12)


def test_a_block_with_a_projection_is_joined_in_its_ordinary_form_by_the_plain_wiring_alone():
    with jax.enable_x64(True):
        (f,), (g,), (x, _) = rectified_chain(1), make_chain(1), inputs()
        shortcut = 2 * x + 1
        inner = Residual.__call__(f, x, key=None, aux=None)
        np.testing.assert_allclose(PLAIN.join(f, x, shortcut), jax.nn.relu(shortcut + inner), rtol=1e-12)
        np.testing.assert_allclose(REWIRED.join(f, x, shortcut), shortcut + jax.nn.relu(inner), rtol=1e-12)
        for wiring in (PLAIN, REWIRED):
            np.testing.assert_allclose(wiring.join(g, x, shortcut), shortcut + g(x, key=None, aux=None), rtol=1e-12)
    x, _ = inputs(dtype=jnp.float32)
    (low,) = rectified_chain(1, jnp.bfloat16)
    assert REWIRED.join(low, x.astype(jnp.bfloat16), x).dtype == PLAIN.join(low, x, x).dtype == jnp.float32


def test_drop_path_differs_by_key_and_is_off_without():
    with jax.enable_x64(True):
        f, (x, _) = make_chain(6), inputs()
        run = jax.jit(lambda key: REWIRED(f, x, key=key))
        first, second = run(jax.random.key(0)), run(jax.random.key(1))
        np.testing.assert_array_equal(first, run(jax.random.key(0)))
        assert not np.allclose(first, second)
        assert not np.allclose(first, REWIRED(f, x))


def test_low_precision_branches_invert_bit_exactly_at_depth_48():
    """Generic inputs and drop path; the control without the grid shows that the claim could fail."""
    x, aux = inputs(64, jnp.float32)
    branches = make_chain(48, dtype=jnp.bfloat16, alternate=True)
    jit = functools.partial(jax.jit, compiler_options=quick.AS_USERS_DO)
    report = jit(lambda b, x, key: diagnose_chain(REWIRED, b, x, key=key, aux=aux))
    exact = report(branches, x, jax.random.key(5))
    assert exact.reconstruction_error == 0
    assert 1 < exact.largest_state < 1024
    with pytest.MonkeyPatch.context() as patch:
        for module in ("reversible", "branch"):  # of a chain's start, and of what is added
            patch.setattr(f"re2tal_jax.{module}.to_grid", lambda x: x)
        control = jit(lambda b, x, key: diagnose_chain(REWIRED, b, x, key=key, aux=aux))
        assert control(branches, x, jax.random.key(5)).reconstruction_error > 1e-7


def test_gradient_of_low_precision_branches_equals_plain_autodiff_to_bfloat16_rounding():
    x, aux = inputs(16, jnp.float32)
    branches = make_chain(6, dtype=jnp.bfloat16)
    grad = {
        reversible: jax.jit(jax.grad(lambda x, r=reversible: jnp.sum(Wiring(0.0, 1.0, r)(branches, x, aux=aux) ** 2)))(
            x
        )
        for reversible in (True, False)
    }
    np.testing.assert_allclose(grad[True], grad[False], rtol=2e-2, atol=2e-2)


def test_float32_branches_are_left_off_the_grid():
    x, _ = inputs(dtype=jnp.float32)
    f = make_chain(2, dtype=jnp.float32)
    y = REWIRED(f, x)
    assert not np.array_equal(np.asarray(y) * GRID * 2, np.round(np.asarray(y) * GRID * 2))
    low = REWIRED(make_chain(2, dtype=jnp.bfloat16), x)
    np.testing.assert_array_equal(np.asarray(low) * GRID * 2, np.round(np.asarray(low) * GRID * 2))


def test_grid_rounds_to_the_nearest_step_and_passes_gradients_through():
    x = jnp.asarray([0.3, -1.00004, 1000.00001], jnp.float32)
    np.testing.assert_allclose(to_grid(x), x, atol=0.5 / GRID)
    np.testing.assert_array_equal(jax.grad(lambda x: to_grid(x).sum())(x), jnp.ones(3))


def test_a_widened_number_keeps_the_rounding_that_compilers_skip():
    """In bfloat16 3 + 0.0123 is 3.015625; the control shows the compiled sum without its rounding."""
    a, b = jnp.asarray([3.0, 1.0], jnp.bfloat16), jnp.asarray([0.0123, 0.001], jnp.bfloat16)
    np.testing.assert_array_equal(jax.jit(lambda a, b: widen(a + b, jnp.float32))(a, b), [3.015625, 1.0])
    control = jax.jit(lambda a, b: (a + b).astype(jnp.float32))
    assert jnp.all(control(a, b) != jnp.float32([3.015625, 1.0]))
    assert widen(a, jnp.bfloat16) is a


def test_sums_are_in_float32_but_for_float64():
    with jax.enable_x64(True):
        assert at_least_float32(jnp.float64) == jnp.float64
    for dtype in (jnp.uint8, jnp.bool_, jnp.int32, jnp.float16, jnp.bfloat16, jnp.float32):
        assert at_least_float32(dtype) == jnp.float32


@dataclass(frozen=True)
class RowTiles:
    """Rows of the last-but-one axis, `size` at a time, as circular indexing from row `offset`."""

    count: int
    size: int
    offset: int

    def _rows(self, state, tile):
        return (self.offset + tile * self.size + jnp.arange(self.size, dtype=jnp.int32)) % state.shape[-2]

    def read(self, state, tile):
        return state[..., self._rows(state, tile), :]

    def write(self, state, value, tile):
        return state.at[..., self._rows(state, tile), :].set(value)


class Tiled(Residual):
    """The same residual function, run on two rows at a time and told which; it notes how many rows it was given."""

    seen: ClassVar[list[int]] = []

    def tiles(self, shape):
        return RowTiles(count=shape[-2] // 2, size=2, offset=1)

    def __call__(self, x, *, key, aux, tile=None):
        self.seen.append(x.shape[-2])
        assert (x.shape[-2] == 2) == (tile is not None)
        return super().__call__(x, key=key, aux=aux)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Squaring:
    """x -> tanh(x @ weight @ weight); the product of weights alone can be prepared."""

    weight: jax.Array
    square: jax.Array | None = None
    prepared: ClassVar[list[bool]] = []

    def prepare(self):
        return replace(self, square=self.weight @ self.weight)

    def __call__(self, x, *, key, aux):
        self.prepared.append(self.square is not None)
        return jnp.tanh(x @ (self.weight @ self.weight if self.square is None else self.square))


def test_what_is_prepared_once_is_differentiated_to_the_parameters():
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(1), (3, WIDTH), jnp.float64)
        branches = [Squaring(w) for w in jax.random.normal(jax.random.key(2), (4, WIDTH, WIDTH), jnp.float64) / WIDTH]

        def loss(branches, x, reversible):
            return jnp.sum(jnp.sin(Wiring(0.2, 0.9, reversible)(branches, x)))

        gradients = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
        found = gradients(branches, x, True)
        assert True in Squaring.prepared
        by_hand = jax.grad(lambda b, x: jnp.sum(jnp.sin(unrolled(b, x, 0.2, 0.9))), argnums=(0, 1))(branches, x)
        assert_trees_close(found, by_hand, 1e-10)


def unrolled(branches, x, alpha, beta):
    """The recurrence as it is written, without the module under test."""
    last, before = x, x
    for branch in branches:
        last, before = branch(last, key=None, aux=None) + alpha * last + beta * before, last
    return (last + beta * before) / (1 + beta)


def test_tiles_in_place_give_the_values_and_gradients_of_whole_tensors():
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(1), (3, 6, WIDTH), jnp.float64)
        rngs = [nnx.Rngs(7), nnx.Rngs(7)]
        whole = [Residual(0.0, jnp.tanh, rngs=rngs[0]) for _ in range(5)]
        tiled = [Tiled(0.0, jnp.tanh, rngs=rngs[1]) for _ in range(5)]

        def value_and_grad(branches, reversible):
            loss = lambda b, x: jnp.sum(jnp.sin(Wiring(0.2, 0.9, reversible)(b, x)))  # noqa: E731
            return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(branches, x)

        want = value_and_grad(whole, False)
        assert_trees_close(value_and_grad(tiled, True), want, 1e-10)
        assert 2 in Tiled.seen
        Tiled.seen.clear()
        assert_trees_close(value_and_grad(tiled, False), want, 1e-10)
        assert set(Tiled.seen) == {6}  # autodiff of the twin would store what every tile began with


class Backbone(nnx.Module):
    def __init__(self, wiring):
        self.blocks = nnx.List(make_chain(4, dtype=jnp.float32))
        self.wiring = wiring

    def __call__(self, x):
        return self.wiring(list(self.blocks), x)


def test_rewire_there_and_back_shares_parameters():
    plain = Backbone(PLAIN)
    rewired = rewire(plain)
    x, _ = inputs(dtype=jnp.float32)
    assert not np.allclose(plain(x), rewired(x))
    np.testing.assert_array_equal(rewire(rewired, PLAIN)(x), plain(x))
    np.testing.assert_array_equal(rewired(x), Backbone(REWIRED)(x))
    assert plain.wiring == PLAIN
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(rewired), strict=True):
        assert a is b


def test_coefficients_may_be_traced_without_compiling_again():
    module = Backbone(REWIRED)
    x, _ = inputs(dtype=jnp.float32)
    run = jax.jit(lambda alpha: rewire(module, Wiring(alpha, 1 - alpha, True))(x))
    first, second = run(jnp.float32(0.1)), run(jnp.float32(0.2))
    assert run._cache_size() == 1
    assert not np.allclose(first, second)


def test_diagnose_reports_every_chain_of_a_module():
    x, _ = inputs(dtype=jnp.float32)
    (record,) = diagnose(Backbone(PLAIN), x, wiring=REWIRED)
    assert 0 < record.reconstruction_error < 1e-5
    assert record.largest_state >= float(jnp.abs(x).max())


def test_rewiring_what_has_no_chain_is_refused():
    with pytest.raises(ValueError, match="no attribute `wiring`"):
        rewire(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


def test_beta_zero_has_no_inverse():
    with pytest.raises(ValueError, match=r"beta = 0\.0 has no inverse"):
        Wiring(1.0, 0.0, True)(make_chain(1, dtype=jnp.float32), jnp.ones((1, WIDTH)))


@pytest.mark.parametrize("stored", [0, 4])
def test_gradients_take_the_places_of_parameters_and_not_of_integers(stored):
    def branch(factor, weight, bias, x, *, key, aux):
        return jnp.tanh(x @ weight) * factor.astype(x.dtype) + bias.astype(x.dtype)

    with jax.enable_x64(True):
        weights = jax.random.normal(jax.random.key(0), (6, WIDTH, WIDTH), jnp.float64)
        biases = jax.random.normal(jax.random.key(1), (6, WIDTH), jnp.float64).astype(jnp.bfloat16)
        x, _ = inputs()

        def gradients(wiring):
            def loss(weights, biases):
                parts = zip(weights, biases, strict=True)
                chain = [jax.tree_util.Partial(branch, jnp.int32(1 + i % 3), *part) for i, part in enumerate(parts)]
                return jnp.sum(jnp.sin(wiring(chain, x, stored=stored)))

            return jax.jit(jax.grad(loss, (0, 1)))(weights, biases)

        got, expected = (gradients(wiring) for wiring in (REWIRED, REWIRED.twin))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-10, atol=1e-12)
    assert got[1].dtype == jnp.bfloat16
    np.testing.assert_allclose(got[1].astype(float), expected[1].astype(float), rtol=0.02, atol=0.02)
