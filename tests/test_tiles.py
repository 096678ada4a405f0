"""Tiles of a grid: they cover it once, go over its end where they are shifted, and change nothing but memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from re2tal_jax.backbones.tiles import GridTiles, plan_tiles
from re2tal_jax.backbones.video_swin import VideoSwin
from re2tal_jax.chunks import count_chunks, in_chunks
from re2tal_jax.diagnostics import diagnose
from re2tal_jax.reversible import REWIRED, Wiring, rewire

FAST = {"xla_backend_optimization_level": 0}


@st.composite
def grids(draw: st.DrawFn) -> GridTiles:
    """Any grid of whole tiles, moved by less than a tile."""
    tile = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    size = tuple(n * draw(st.integers(1, 3)) for n in tile)
    shift = tuple(draw(st.integers(0, n - 1)) for n in tile)
    return GridTiles(size, tile, shift)


@settings(deadline=None, max_examples=20)  # each shape is compiled
@given(grids())
def test_tiles_cover_a_grid_once(tiles):
    state = jnp.arange(2 * tiles.size[0] * tiles.size[1] * 3).reshape(2, *tiles.size, 3)
    read = [np.asarray(tiles.read(state, tile)) for tile in range(tiles.count)]
    assert all(part.shape == (2, *tiles.tile_size, 3) for part in read)
    assert sorted(np.concatenate([part.ravel() for part in read])) == list(range(state.size))


@settings(deadline=None, max_examples=20)  # each shape is compiled
@given(grids())
def test_what_is_read_is_the_shifted_grid_and_written_back_in_its_place(tiles):
    state = jnp.arange(tiles.size[0] * tiles.size[1] * 2).reshape(1, *tiles.size, 2)
    moved = np.roll(state, (-tiles.shift[0], -tiles.shift[1]), (1, 2))
    back = jnp.zeros_like(state)
    for tile in range(tiles.count):
        top, left = tiles.start(tile)
        part = tiles.read(state, tile)
        np.testing.assert_array_equal(part, moved[:, top : top + tiles.tile_size[0], left : left + tiles.tile_size[1]])
        back = tiles.write(back, part, tile)
    np.testing.assert_array_equal(back, state)


def test_tiles_are_the_largest_that_the_workspace_allows():
    def size(workspace: int) -> tuple[int, int]:
        return plan_tiles((8, 12), (2, 3), 10, workspace).tile_size

    assert size(10 * 8 * 12) == (8, 12)
    assert size(10 * 8 * 12 - 1) == (4, 12)
    assert size(10 * 2 * 12) == (2, 12)
    assert size(10 * 2 * 12 - 1) == (2, 6)
    assert size(10 * 2 * 3) == (2, 3)
    assert size(1) == (2, 3)  # never less than a unit


def test_chunks_are_as_few_as_the_workspace_allows():
    assert [count_chunks(12, 10, workspace) for workspace in (1000, 120, 119, 40, 10, 1)] == [1, 1, 2, 3, 12, 12]


def scaled(scale, x, y):
    return jnp.tanh(scale * x) * jnp.repeat(y, 2, axis=1)


def test_chunks_give_the_values_and_gradients_of_the_whole():
    with jax.enable_x64(True):
        x, y = (jax.random.normal(jax.random.key(n), (2, 12 // n, 3), jnp.float64) for n in (1, 2))

        def loss(count):
            return lambda *arguments: jnp.sum(jnp.sin(in_chunks(scaled, count, *arguments)))

        whole = jax.value_and_grad(lambda *arguments: jnp.sum(jnp.sin(scaled(*arguments))), argnums=(0, 1, 2))
        for count in (1, 2, 6):
            found = jax.jit(jax.value_and_grad(loss(count), argnums=(0, 1, 2)))(jnp.float64(0.7), x, y)
            for ours, theirs in zip(
                jax.tree.leaves(found), jax.tree.leaves(whole(jnp.float64(0.7), x, y)), strict=True
            ):
                np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def swin(workspace: int, dtype=jnp.float64) -> VideoSwin:
    """Two stages whose grids are odd and need padding in each axis, shifted blocks among them."""
    return VideoSwin(
        patch_size=(2, 2, 2),
        embed_dim=4,
        depths=(2, 4),
        num_heads=(1, 2),
        window_size=(2, 3, 3),
        drop_path_rate=0.3,
        workspace=workspace,
        dtype=dtype,
        rngs=nnx.Rngs(0),
    )


VIDEO = (2, 10, 22, 18, 3)


def counts(workspace: int) -> list[int]:
    """The numbers of tiles that the branches of a network are run in."""
    seen = []
    original = GridTiles.count.fget

    def count(self):
        seen.append(original(self))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridTiles, "count", property(count))
        jax.eval_shape(swin(workspace, jnp.float32), jax.ShapeDtypeStruct(VIDEO, jnp.float32))
    return seen


@pytest.mark.parametrize("workspace", [1, 3000])
def test_tiles_change_neither_values_nor_gradients(workspace):
    """On odd sizes, with padding, shifts and drop path; the whole tensors are one tile."""
    assert max(counts(2**30)) == 1
    assert max(counts(workspace)) > 1
    with jax.enable_x64(True):
        video = jax.random.normal(jax.random.key(1), VIDEO, jnp.float64)

        def value_and_gradients(workspace: int, wiring: Wiring):
            graph, state = nnx.split(rewire(swin(workspace), wiring))
            state = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state)

            def loss(state, video):
                return jnp.sum(nnx.merge(graph, state)(video, key=jax.random.key(7)) ** 3)

            return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), compiler_options=FAST)(state, video)

        whole = value_and_gradients(2**30, Wiring(0.0, 1.0, reversible=False))
        tiled = value_and_gradients(workspace, REWIRED)
        for ours, theirs in zip(jax.tree.leaves(tiled), jax.tree.leaves(whole), strict=True):
            assert np.abs(np.asarray(ours - theirs)).max() <= 1e-10 * np.abs(np.asarray(theirs)).max()


def test_low_precision_tiles_are_undone_exactly():
    model = swin(1, jnp.bfloat16)
    video = jax.random.normal(jax.random.key(1), VIDEO)

    @jax.jit
    def run(video):
        return diagnose(model, video, key=jax.random.key(7), wiring=REWIRED)

    records = run(video)
    assert len(records) == 2
    assert all(record.reconstruction_error == 0 for record in records)
    assert all(record.largest_state > 1 for record in records)
