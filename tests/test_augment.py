from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from re2tal_jax.data.augment import AugmentConfig, LabelSwap, augment, evaluation, mirror
from re2tal_jax.data.scenes import CLASSES, FLIP, REVERSE
from re2tal_jax.errors import ConfigError
from re2tal_jax.types import Batch
from tests import quick

PLAIN = AugmentConfig(height=12, width=10, block_frames=2)
FULL = replace(
    PLAIN,
    crop=0.92,
    flip=0.5,
    rotation_degrees=27.0,
    rotation_probability=0.5,
    brightness=0.5,
    contrast=0.5,
    saturation=0.5,
    hue=0.14,
)
SIZE = (256, 340)

run = jax.jit(augment, static_argnums=2)


def clips(batch=8, frames=5, height=16, width=20):
    return np.random.default_rng(0).integers(0, 256, (batch, frames, height, width, 3), dtype=np.uint8)


def sizes(batch, size=SIZE):
    return np.tile(np.asarray(size, np.float32), (batch, 1))


def ramps(batch, size=64):
    """Stored frames whose red is the column and whose green is the row, times 2."""
    level = np.arange(size, dtype=np.uint8) * 2
    picture = np.stack(np.broadcast_arrays(level[None], level[:, None], np.uint8(0)), axis=-1)
    return np.broadcast_to(picture, (batch, 1, size, size, 3))


def test_without_strength_it_is_a_plain_resize():
    video = clips()
    out = run(video, sizes(8), PLAIN, jax.random.key(0))
    assert out.dtype == jnp.float32
    expected = jax.image.resize(jnp.asarray(video, jnp.float32), (8, 5, 12, 10, 3), "bilinear", antialias=False)
    np.testing.assert_allclose(out, expected, atol=1e-3)


def test_without_strength_and_at_equal_size_nothing_changes():
    video = clips()
    same = replace(PLAIN, height=16, width=20)
    np.testing.assert_allclose(run(video, sizes(8), same, jax.random.key(0)), video, atol=1e-3)


def test_evaluation_ignores_every_strength():
    video = clips()
    exact = jax.jit(augment, static_argnums=2, compiler_options=quick.AS_USERS_DO)
    np.testing.assert_array_equal(exact(video, sizes(8), FULL, None), exact(video, sizes(8), PLAIN, jax.random.key(0)))
    assert evaluation(FULL) == replace(PLAIN, rotation_probability=0.5)


def test_a_flip_is_exact():
    video, key = clips(), jax.random.key(1)
    straight = run(video, sizes(8), PLAIN, key)
    np.testing.assert_array_equal(run(video, sizes(8), replace(PLAIN, flip=1.0), key), straight[..., ::-1, :])
    half = run(video, sizes(8), replace(PLAIN, flip=0.5), key)
    flipped = (half == straight[..., ::-1, :]).all(axis=(1, 2, 3, 4))
    assert ((half == straight).all(axis=(1, 2, 3, 4)) ^ flipped).all()
    assert 0 < flipped.sum() < 8


def test_all_frames_of_a_clip_change_alike_and_clips_differently():
    video = np.broadcast_to(clips(1, 1), (8, 5, 16, 20, 3))
    out = run(video, sizes(8), FULL, jax.random.key(0))
    np.testing.assert_array_equal(out, np.broadcast_to(out[:, :1], out.shape))
    firsts = np.asarray(out[:, 0])
    assert all(np.abs(firsts[i] - firsts[j]).max() > 1 for i in range(8) for j in range(i))
    np.testing.assert_array_equal(run(video, sizes(8), FULL, jax.random.key(0)), out)
    assert np.abs(run(video, sizes(8), FULL, jax.random.key(1)) - out).max() > 1
    assert 0 <= out.min() <= out.max() <= 255


def test_the_center_has_the_proportions_of_the_source():
    """Stored 64 x 64 shows 64 x 128 source pixels: the centre square is columns 16..48, all rows."""
    out = run(ramps(1), sizes(1, (64, 128)), AugmentConfig(height=32, width=32, center=True), None)[0, 0]
    columns = 2 * (np.arange(32) + 0.5 + 16 - 0.5)
    rows = 2 * ((np.arange(32) + 0.5) * 2 - 0.5)
    np.testing.assert_allclose(out[:, :, 0], np.tile(columns, (32, 1)), atol=1e-3)
    np.testing.assert_allclose(out[:, :, 1], np.tile(rows[:, None], (1, 32)), atol=1e-3)


def shown_box(out, size=64):
    """Return top, left, height, width, in shares of the picture, from the slopes of ramps in the inner pixels."""
    height, width = out.shape[:2]
    inner = np.asarray(out[height // 4 : -height // 4, width // 4 : -width // 4], np.float64) / (2 * size)
    across, down = np.diff(inner[..., 0], axis=1).mean() * width, np.diff(inner[..., 1], axis=0).mean() * height
    middle = [inner[..., i].mean() + 0.5 / size for i in (1, 0)]
    return middle[0] - down / 2, middle[1] - across / 2, down, across


def test_random_crops_have_the_area_and_proportions_of_the_recipe():
    config = AugmentConfig(height=32, width=32, crop=0.92)
    out = run(ramps(256), sizes(256), config, jax.random.key(2))[:, 0]
    boxes = np.array([shown_box(x) for x in out])
    top, left, height, width = boxes.T
    assert (boxes[:, :2] > -0.01).all()
    assert (top + height < 1.01).all()
    assert (left + width < 1.01).all()
    aspect, area = (width * SIZE[1]) / (height * SIZE[0]), height * width
    assert (aspect > 0.73).all()
    assert (aspect < 1.37).all()
    assert 0.07 < area.min() < 0.12
    assert 0.85 < area.max() <= 1.01
    assert 0.4 < area.mean() < 0.6


def test_a_crop_that_never_fits_is_the_centred_square():
    """A strip of 1 : 10 holds no crop of 99 % of its area with aspect 1."""
    config = AugmentConfig(height=32, width=32, crop=0.01, aspect=1.0)
    out = run(ramps(1), sizes(1, (100, 1000)), config, jax.random.key(0))[0, 0]
    np.testing.assert_allclose(shown_box(out), (0, 0.45, 1, 0.1), atol=0.01)


def test_a_turned_clip_shows_the_picture_at_the_angle():
    config = AugmentConfig(height=64, width=64, rotation_degrees=27.0, rotation_probability=1.0)
    out = np.asarray(run(ramps(32), sizes(32, (64, 64)), config, jax.random.key(3))[:, 0, 24:40, 24:40, :2]) / 2
    across, down = np.diff(out, axis=2).mean((1, 2)), np.diff(out, axis=1).mean((1, 2))
    angles = np.arctan2(across[:, 1], across[:, 0])
    np.testing.assert_allclose(across, np.stack([np.cos(angles), np.sin(angles)], -1), atol=0.01)
    np.testing.assert_allclose(down, np.stack([-np.sin(angles), np.cos(angles)], -1), atol=0.01)
    assert 0.3 < np.abs(angles).max() <= np.deg2rad(27)
    assert angles.min() < -0.1 < 0.1 < angles.max()


def test_clips_that_are_not_turned_are_those_of_the_straight_path():
    video, key = clips(), jax.random.key(4)
    never = replace(PLAIN, crop=0.9, flip=0.5)
    turned = replace(never, rotation_degrees=27.0, rotation_probability=0.0)
    np.testing.assert_allclose(run(video, sizes(8), turned, key), run(video, sizes(8), never, key), atol=2e-2)


def test_colors_change_as_named():
    grey = np.full((16, 1, 4, 4, 3), 100, np.uint8)
    base, key = AugmentConfig(height=4, width=4), jax.random.key(5)
    for kept in (replace(base, saturation=0.5), replace(base, hue=0.3), replace(base, contrast=0.5)):
        np.testing.assert_allclose(run(grey, sizes(16), kept, key), grey, atol=0.3)  # grey stays grey
    bright = np.asarray(run(grey, sizes(16), replace(base, brightness=0.5), key))[:, 0, 0, 0, 0]
    assert 50 <= bright.min() < 70 < 130 < bright.max() <= 150
    colored = np.broadcast_to(np.array([120, 90, 60], np.uint8), (16, 1, 4, 4, 3))
    turned = np.asarray(run(colored, sizes(16), replace(base, hue=0.1), key))
    luma = turned @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(luma, 120 * 0.299 + 90 * 0.587 + 60 * 0.114, atol=0.3)
    assert np.abs(turned - colored).max() > 5
    contrasted = np.asarray(run(ramps(16), sizes(16), replace(base, contrast=0.5), key))
    spread = contrasted[..., 0].std(axis=(1, 2, 3)) / np.asarray(run(ramps(16), sizes(16), base, key))[0, ..., 0].std()
    assert 0.5 <= spread.min() < 0.7 < 1.3 < spread.max() <= 1.5


def test_uint8_is_the_rounded_result():
    video, key = clips(), jax.random.key(0)
    low, exact = (run(video, sizes(8), replace(FULL, dtype=dtype), key) for dtype in ("uint8", "float32"))
    assert low.dtype == jnp.uint8
    np.testing.assert_allclose(low.astype(jnp.float32), exact, atol=0.5 + 1e-3)


def test_one_compilation_serves_every_key():
    run(clips(), sizes(8), FULL, jax.random.key(10))
    before = run._cache_size()
    run(clips(), sizes(8), FULL, jax.random.key(11))
    assert run._cache_size() == before


def test_the_workspace_does_not_grow_with_the_clip():
    def temp_bytes(frames):
        video = jax.ShapeDtypeStruct((1, frames, 32, 32, 3), jnp.uint8)
        size = jax.ShapeDtypeStruct((1, 2), jnp.float32)
        compiled = run.lower(video, size, replace(FULL, height=32, width=32), jax.random.key(0)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temp_bytes(256) < 1.05 * temp_bytes(32) < 32 * 32 * 32 * 3 * 4


def test_a_batch_split_over_devices_needs_no_exchange_and_gives_the_same():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    video, size = jax.device_put(clips(), split), jax.device_put(sizes(8), split)
    compiled = jax.jit(augment, static_argnums=2, out_shardings=split).lower(video, size, FULL, jax.random.key(0))
    compiled = compiled.compile()
    assert not any(name in compiled.as_text() for name in ("all-gather", "all-reduce", "all-to-all", "permute"))
    out = compiled(video, size, jax.random.key(0))
    np.testing.assert_allclose(out, run(clips(), sizes(8), FULL, jax.random.key(0)), atol=1e-3)


@pytest.mark.parametrize(
    ("name", "value"),
    [("height", 0), ("crop", 1.0), ("flip", 1.5), ("aspect", 0.5), ("hue", 0.6), ("contrast", -0.1)],
)
def test_a_strength_out_of_range_is_named(name, value):
    with pytest.raises(ConfigError, match=f"{name} = {value} is not allowed"):
        replace(PLAIN, **{name: value})


SWAP = LabelSwap.from_names(CLASSES, FLIP, REVERSE)


def small_batch():
    """Two clips of 6 frames, 3 snippets; of the second only 2 snippets are real. One segment each, and a padded one."""
    video = clips(2, 6, 4, 4)
    segments = np.array([[[0.5, 1.0], [0, 0]], [[0.0, 1.5], [0, 0]]], np.float32)
    left, grow = CLASSES.index("left"), CLASSES.index("grow")
    return Batch(
        video=jnp.asarray(video),
        frame_size=jnp.asarray(sizes(2)),
        mask=jnp.array([[True, True, True], [True, True, False]]),
        gt_segments=jnp.asarray(segments),
        gt_labels=jnp.array([[left, 0], [grow, 0]], jnp.int32),
        gt_mask=jnp.array([[True, False], [True, False]]),
        window=jnp.array([4, 7], jnp.int32),
    )


def named(batch):
    return [CLASSES[int(label)] for label in batch.gt_labels[:, 0]]


def test_a_mirrored_clip_has_the_swapped_class():
    batch = small_batch()
    out = mirror(batch, SWAP, jax.random.key(0), flip=1.0, reverse=0.0)
    np.testing.assert_array_equal(out.video, batch.video[:, :, :, ::-1])
    np.testing.assert_array_equal(out.gt_segments, batch.gt_segments)
    assert named(out) == ["right", "grow"]


def test_a_clip_played_backward_has_mirrored_segments_and_the_swapped_class():
    batch = small_batch()
    out = mirror(batch, SWAP, jax.random.key(0), flip=0.0, reverse=1.0)
    np.testing.assert_array_equal(out.video[0], batch.video[0, ::-1])
    np.testing.assert_array_equal(out.video[1], batch.video[1, jnp.array([3, 2, 1, 0, 4, 5])])  # padding stays behind
    np.testing.assert_array_equal(out.gt_segments[:, 0], [[2.0, 2.5], [0.5, 2.0]])
    np.testing.assert_array_equal(out.gt_segments[:, 1], 0)
    assert named(out) == ["right", "shrink"]
    np.testing.assert_array_equal(out.gt_labels[:, 1], 0)


def test_mirroring_twice_gives_the_batch_back():
    batch = small_batch()
    out = mirror(
        mirror(batch, SWAP, jax.random.key(0), flip=1.0, reverse=1.0), SWAP, jax.random.key(1), flip=1.0, reverse=1.0
    )
    jax.tree.map(np.testing.assert_array_equal, out, batch)


def test_a_swap_of_an_unknown_class_is_an_error():
    with pytest.raises(ConfigError, match="'up', which is no class"):
        LabelSwap.from_names(CLASSES, {"up": "left"}, {})
