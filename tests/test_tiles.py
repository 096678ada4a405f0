"""Tiles of a grid: they cover it once, go over its end where they are shifted, and change nothing but memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from re2tal_jax.backbones.slowfast import SlowFast
from re2tal_jax.backbones.tiles import FrameTiles, GridTiles, plan_frames, plan_tiles
from re2tal_jax.backbones.video_swin import VideoSwin
from re2tal_jax.backbones.vit import VisionTransformer
from re2tal_jax.chunks import add_stretch, count_chunks, in_chunks, in_overlapping_chunks, read_stretch
from re2tal_jax.diagnostics import diagnose
from re2tal_jax.reversible import REWIRED, Wiring, rewire
from tests import quick
from tests.parameters import drawn


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


@settings(deadline=None, max_examples=10)  # each shape is compiled
@given(st.integers(1, 7), st.integers(0, 4), st.data())
def test_a_stretch_has_the_frames_around_it_and_zeros_outside(frames, halo, data):
    length = data.draw(st.integers(1, frames))
    begin = data.draw(st.integers(0, frames - length))
    state, value = (np.arange(6 * n, dtype=np.float32).reshape(2, n, 3) + 1 for n in (frames, length + 2 * halo))
    around = [(0, 0), (halo, halo), (0, 0)]
    seen = slice(begin, begin + length + 2 * halo)
    np.testing.assert_array_equal(read_stretch(state, begin, length, halo), np.pad(state, around)[:, seen])
    padded = np.pad(state, around)
    padded[:, seen] += value
    np.testing.assert_array_equal(add_stretch(state, value, begin, halo), padded[:, halo : halo + frames])


def smoothed(scale, x, y):
    """Sums of five neighbours of x and three of every second of y, in two arrays."""
    wide = sum(x[:, i : x.shape[1] - 4 + i] for i in range(5))
    sparse = sum(y[:, i : y.shape[1] - 2 + i : 2] for i in range(3))
    return jnp.sin(scale * wide), jnp.cos(sparse)


def test_overlapping_chunks_give_the_values_and_gradients_of_the_whole():
    """Stretches of one position, shorter than what is seen around them, among them."""
    with jax.enable_x64(True):
        x, y = (jax.random.normal(jax.random.key(n), (2, 6 * n, 3), jnp.float64) for n in (1, 2))

        def loss(function):
            return lambda *a: sum(jnp.sum(jnp.sin((n + 2) * part)) for n, part in enumerate(function(*a)))

        def whole(scale, x, y):
            return smoothed(scale, *(jnp.pad(a, [(0, 0), (n, n), (0, 0)]) for a, n in ((x, 2), (y, 1))))

        want = jax.value_and_grad(loss(whole), argnums=(0, 1, 2))(jnp.float64(0.7), x, y)
        for count in (1, 2, 6):
            chunked = functools.partial(in_overlapping_chunks, smoothed, count, (2, 1))
            got = jax.jit(jax.value_and_grad(loss(chunked), argnums=(0, 1, 2)))(jnp.float64(0.7), x, y)
            for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-13)


def test_frames_around_a_tile_are_given_and_get_their_share_back():
    tiles = plan_frames(6, per_frame=10, workspace=25, halo=1)
    assert (tiles.length, tiles.count) == (2, 3)
    state = jnp.arange(1.0, 7).reshape(1, 6, 1)
    given = [np.asarray(tiles.read_input(state, tile)).ravel().tolist() for tile in range(3)]
    assert given == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 0]]
    assert tiles.middle(tiles.read_input(state, 1)).ravel().tolist() == tiles.read(state, 1).ravel().tolist() == [3, 4]
    assert tiles.write(state, jnp.zeros((1, 2, 1)), 2).ravel().tolist() == [1, 2, 3, 4, 0, 0]
    total = jnp.zeros_like(state)
    for tile in range(3):
        total = tiles.add_input(total, jnp.ones((1, 4, 1)), tile)
    assert total.ravel().tolist() == [1, 2, 2, 2, 2, 1]  # by how many tiles each frame is seen


def swin(workspace: int, dtype=jnp.float64, stored_blocks: int = 0) -> VideoSwin:
    """Two stages whose grids are odd and need padding in each axis, shifted blocks among them."""
    return VideoSwin(
        patch_size=(2, 2, 2),
        embed_dim=4,
        depths=(2, 4),
        num_heads=(1, 2),
        window_size=(2, 3, 3),
        drop_path_rate=0.3,
        workspace=workspace,
        stored_blocks=stored_blocks,
        dtype=dtype,
        rngs=nnx.Rngs(0),
    )


def vit(workspace: int, dtype=jnp.float64, stored_blocks: int = 0) -> VisionTransformer:
    """Three clips of 12 tokens in the video below."""
    return VisionTransformer(
        patch_size=4,
        embed_dim=8,
        depth=3,
        num_heads=2,
        num_frames=4,
        image_size=8,
        drop_path_rate=0.3,
        workspace=workspace,
        stored_blocks=stored_blocks,
        dtype=dtype,
        rngs=nnx.Rngs(0),
    )


def slowfast(workspace: int, dtype=jnp.float64, stored_blocks: int = 0) -> SlowFast:
    """A slow stage that sees single frames, and stages that see three; odd sizes."""
    return SlowFast(
        depths=(2, 3),
        base_channels=8,
        channel_ratio=4,
        slow_inflate=(0, 1),
        fast_inflate=(1, 1),
        lateral_norm=True,
        workspace=workspace,
        stored_blocks=stored_blocks,
        dtype=dtype,
        rngs=nnx.Rngs(0),
    )


NETWORKS = {  # with a video and a workspace between those of the smallest tiles and of a single one
    "video_swin": (swin, (2, 10, 22, 18, 3), 3000),
    "vit": (vit, (2, 12, 9, 12, 3), 700),  # attention in whole clips, an MLP on halves of them
    "slowfast": (slowfast, (2, 12, 10, 13, 3), 4000),
}


def counts(network: str, workspace: int) -> list[int]:
    """The numbers of tiles that the branches of a network are run in."""
    seen = []
    build, video, _ = NETWORKS[network]
    originals = {kind: kind.count.fget for kind in (GridTiles, FrameTiles)}

    def count(self):
        seen.append(originals[type(self)](self))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        for kind in originals:
            patch.setattr(kind, "count", property(count))
        jax.eval_shape(drawn(lambda: build(workspace, jnp.float32)), jax.ShapeDtypeStruct(video, jnp.float32))
    return seen


@functools.cache
def value_and_gradients(network: str, workspace: int, wiring: Wiring, stored_blocks: int = 0):
    """Of a loss of all features, for every parameter and the video, in float64."""
    build, size, _ = NETWORKS[network]
    with jax.enable_x64(True):
        video = np.random.default_rng(1).normal(size=size)
        model = drawn(lambda: build(workspace, stored_blocks=stored_blocks), np.float64)
        graph, state = nnx.split(rewire(model, wiring))

        def loss(state, video):
            features = jax.tree.leaves(nnx.merge(graph, state)(video, key=jax.random.key(7)))
            return sum(jnp.sum(feature**3) for feature in features)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(state, video)


@pytest.mark.parametrize("smallest", [True, False], ids=["smallest", "between"])
@pytest.mark.parametrize("network", NETWORKS)
def test_tiles_change_neither_values_nor_gradients(network, smallest):
    """On odd sizes, with padding, shifts and drop path; the whole tensors are one tile."""
    _, _, between = NETWORKS[network]
    workspace = 1 if smallest else between
    assert max(counts(network, 2**30)) == 1
    assert max(counts(network, workspace)) > 1
    assert smallest or max(counts(network, workspace)) < max(counts(network, 1))
    assert_equal_to_whole_tensors(network, value_and_gradients(network, workspace, REWIRED))


@pytest.mark.parametrize("network", NETWORKS)
def test_stored_blocks_change_neither_values_nor_gradients(network):
    """Tile by tile, behind blocks of the same chain that are undone."""
    _, _, between = NETWORKS[network]
    assert_equal_to_whole_tensors(network, value_and_gradients(network, between, REWIRED, stored_blocks=1))


def assert_equal_to_whole_tensors(network: str, found):
    whole = value_and_gradients(network, 2**30, REWIRED.twin)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        assert np.abs(np.asarray(ours) - np.asarray(theirs)).max() <= 1e-10 * np.abs(np.asarray(theirs)).max()


@pytest.mark.parametrize(("network", "chains"), [("video_swin", 2), ("vit", 1), ("slowfast", 3)])
def test_low_precision_tiles_are_undone_exactly(network, chains):
    build, size, _ = NETWORKS[network]
    model = drawn(lambda: build(1, jnp.bfloat16))
    video = jnp.asarray(np.random.default_rng(1).normal(size=size), jnp.float32)

    @functools.partial(jax.jit, compiler_options=quick.AS_USERS_DO)
    def run(video):
        return diagnose(model, video, key=jax.random.key(7), wiring=REWIRED)

    records = run(video)
    assert len(records) == chains  # the first stage of the slow pathway has nothing to undo
    assert all(record.reconstruction_error == 0 for record in records)
    assert all(record.largest_state > 1 for record in records)
