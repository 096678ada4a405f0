"""Features in the place of videos: files, rows of windows, what disagrees, settings, and the detector behind them."""

import dataclasses
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from re2tal_jax.backbones.precomputed import Precomputed
from re2tal_jax.config import read_config_file
from re2tal_jax.data.activitynet import activitynet
from re2tal_jax.data.elements import LoaderConfig
from re2tal_jax.data.features import FeatureConfig, open_features, take_rows
from re2tal_jax.data.features.files import Place, read_features
from re2tal_jax.data.manifest import Manifest, VideoEntry, note_video, read_manifest, write_manifest
from re2tal_jax.data.pipeline import Loader
from re2tal_jax.data.sampling import Padding, RandomTrunc, Resize, SlidingWindow
from re2tal_jax.detector import Detector
from re2tal_jax.errors import ConfigError, DataError
from re2tal_jax.experiment import abstract_batch, check_shapes, draw_blueprint, resolved_config
from re2tal_jax.settings import read_settings
from re2tal_jax.training.sharding import make_mesh
from re2tal_jax.types import VideoRecord
from tests.system import ROOT, changed, tiny_config

FPS, STRIDE, ROWS = 10.0, 4, 20
FRAMES = ROWS * STRIDE


def record(video_id="v", *, seconds=FRAMES / FPS, fps=FPS):
    return VideoRecord(
        video_id=video_id,
        subset="training",
        duration_sec=seconds,
        num_frames=None if fps is None else round(seconds * fps),
        fps=fps,
        segments_sec=np.array([[1.0, 3.0]]),
        labels=np.array([0]),
    )


def numbered(rows=ROWS, channels=3):
    """Row r holds r, 100 + r, 200 + r …"""
    return (np.arange(rows)[:, None] + 100 * np.arange(channels)).astype(np.float32)


def opened(folder, array=None, *, stride=STRIDE, **options):
    if array is not None:
        np.save(folder / "v.npy", array)
    return open_features(FeatureConfig(folder=str(folder), stride=stride, **options), ["v"])


# --- files


@pytest.fixture
def files(tmp_path):
    """The same array in every format."""
    h5py = pytest.importorskip("h5py")
    array = numbered()
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", feats=array)
    with h5py.File(tmp_path / "all.h5", "w") as file:
        file["v_a"] = array
        file["b/feats"] = array
        file["b/other"] = array
    return tmp_path


def test_every_format_gives_the_same_array(files):
    for place in (Place(files / "a.npy"), Place(files / "a.npz"), Place(files / "all.h5", "v_a")):
        np.testing.assert_array_equal(read_features(place), numbered())
    np.testing.assert_array_equal(read_features(Place(files / "all.h5", "b"), key="feats"), numbered())
    np.testing.assert_array_equal(read_features(Place(files / "a.npy"), channels_first=True), numbered().T)


@pytest.mark.torch
def test_tensors_are_read_without_torch_and_pickles_are_not_run(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(torch.from_numpy(numbered()), tmp_path / "one.pt")
    torch.save({"feats": torch.from_numpy(numbered()), "fps": 30.0}, tmp_path / "dict.pt")
    torch.save(torch.from_numpy(numbered()).bfloat16(), tmp_path / "half.pt")
    for name in ("one", "dict"):
        np.testing.assert_array_equal(read_features(Place(tmp_path / f"{name}.pt")), numbered())
    half = read_features(Place(tmp_path / "half.pt"))
    np.testing.assert_array_equal(take_rows(half, np.arange(3.0))[:, 0], [0, 1, 2])
    np.save(tmp_path / "objects.npy", np.array([{}, print], object), allow_pickle=True)
    with pytest.raises(DataError, match=r"objects\.npy: its features cannot be read"):
        read_features(Place(tmp_path / "objects.npy"))


@pytest.mark.parametrize(
    ("name", "content", "key", "message"),
    [
        ("x.npy", b"", None, r"x\.npy: its features cannot be read"),
        ("x.npy", b"no array", None, r"x\.npy: its features cannot be read"),
        ("x.npz", b"PK\3\4", None, r"x\.npz: its features cannot be read"),
        ("x.pt", b"", None, "the file is empty"),
        ("x.npy", np.zeros((2, 3, 4)), None, r"shape \(2, 3, 4\); expected \(rows, channels\)"),
        ("x.npy", np.zeros((0, 4)), None, r"shape \(0, 4\)"),
        ("x.npy", np.array([["a"]]), None, "expected numbers"),
        ("x.npy", numbered(), "feats", "features.key = None"),
        ("x.npz", {"a": numbered(), "b": numbered()}, None, "holds 2 arrays .a, b.: name one as features.key"),
        ("x.npz", {"feats": numbered()}, "feat", "no array is called 'feat' .*Did you mean 'feats'"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, name, content, key, message):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif isinstance(content, dict):
        np.savez(tmp_path / name, **content)
    else:
        np.save(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        read_features(Place(tmp_path / name), key=key)


# --- rows


def test_rows_between_two_are_interpolated_and_those_outside_are_the_nearest():
    taken = take_rows(numbered(), np.array([-2.0, 0.0, 2.25, 19.0, 30.0]))
    np.testing.assert_array_equal(taken[:, 0], [0, 0, 2.25, 19, 19])
    assert take_rows(numbered().astype(np.float16), np.array([1.0])).dtype == np.float32


def test_resize_is_the_identity_for_as_many_rows_and_linear_between_centres_otherwise(tmp_path):
    features = opened(tmp_path, numbered(4), stride=None)
    same = Resize(num_snippets=4, frames_per_snippet=2)
    np.testing.assert_array_equal(features.window(same, record(), 0)[1], numbered(4))
    # as torch's interpolate(mode="linear", align_corners=False) has it
    np.testing.assert_allclose(features.window(Resize(num_snippets=2), record(), 0)[1][:, 0], [0.5, 2.5])
    twice = features.window(Resize(num_snippets=8), record(), 0)[1][:, 1]
    np.testing.assert_allclose(twice, [100, 100.25, 100.75, 101.25, 101.75, 102.25, 102.75, 103])


def test_strided_windows_take_the_rows_of_their_snippets(tmp_path):
    features = opened(tmp_path, numbered())
    sliding = SlidingWindow(num_snippets=8, snippet_stride=STRIDE, overlap=0.5)
    assert sliding.num_windows(record()) == 4
    for index, first in enumerate((0, 4, 8, 12)):
        window, rows = features.window(sliding, record(), index)
        assert rows[:, 0].tolist() == list(range(first, first + 8))
        assert window.num_valid_snippets == 8
    window, rows = features.window(Padding(num_snippets=24, snippet_stride=STRIDE), record(), 0)
    assert (window.num_valid_snippets, rows[-1, 0]) == (20, 19)
    trunc = RandomTrunc(num_snippets=8, snippet_stride=STRIDE)
    window, rows = features.window(trunc, record(), 0, rng=np.random.default_rng(1))
    first = round(window.grid.start_sec * FPS / STRIDE)
    assert rows[:, 0].tolist() == list(range(first, first + 8))
    # 1 s is frame 10, that is snippet 2.5
    np.testing.assert_allclose(window.gt_segments[0, 0], 2.5 - first if first < 2.5 else 0.0, atol=1e-5)


def test_rows_of_another_stride_are_interpolated_at_the_time_of_the_snippets(tmp_path):
    """Rows of 4 frames, centred at frame 2; snippets of 8 frames, at 0, 8 … : rows -0.5, 1.5, 3.5 …"""
    features = opened(tmp_path, numbered(), offset_frames=2.0)
    window, rows = features.window(Padding(num_snippets=12, snippet_stride=8), record(), 0)
    np.testing.assert_allclose(rows[:4, 0], [0, 1.5, 3.5, 5.5])
    assert window.num_valid_snippets == 10


def test_features_of_another_rate_are_found_by_their_seconds(tmp_path):
    """Rows of 4 frames at 5 fps are 0.8 s apart, snippets of 4 frames at 10 fps 0.4 s."""
    features = opened(tmp_path, numbered(10), fps=5.0)
    _, rows = features.window(Padding(num_snippets=20, snippet_stride=4), record(), 0)
    np.testing.assert_allclose(rows[:5, 0], [0, 0.5, 1, 1.5, 2])


def test_snippets_after_the_last_row_are_masked(tmp_path):
    """Clips of 16 frames that lie in the video whole: 17 rows, the last centred at frame 72."""
    features = opened(tmp_path, numbered(17), offset_frames=8.0)
    policy = Padding(num_snippets=24, snippet_stride=STRIDE, offset_frames=8)
    window, rows = features.window(policy, record(), 0)
    assert window.num_valid_snippets == 17
    assert rows[:18, 0].tolist() == [*range(17), 16]


def test_channels_of_several_folders_are_joined(tmp_path):
    for name, rows in (("rgb", ROWS), ("flow", ROWS - 1)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "v.npy", numbered(rows, 2) + (1000 if name == "flow" else 0))
    folders = (str(tmp_path / "rgb"), str(tmp_path / "flow"))
    features = open_features(FeatureConfig(folder=folders, stride=STRIDE), ["v"])
    assert features.channels == 4
    window, rows = features.window(Padding(num_snippets=24, snippet_stride=STRIDE), record(), 0)
    assert rows[3].tolist() == [3, 103, 1003, 1103]
    assert window.num_valid_snippets == ROWS - 1
    np.save(tmp_path / "flow" / "v.npy", numbered(ROWS - 4, 2))
    with pytest.raises(DataError, match=r"'v': .*rgb.* or .*flow.* have 20, 16 rows, which cannot be joined"):
        features.window(Padding(num_snippets=24, snippet_stride=STRIDE), record(), 0)


# --- what disagrees


@pytest.mark.parametrize(
    ("rows", "options", "fits"),
    [
        (20, {}, True),
        (21, {}, True),
        (19, {}, True),
        (17, {}, False),
        (23, {}, False),
        (17, {"offset_frames": 8.0}, True),
        (14, {"offset_frames": 8.0}, False),
        (10, {"fps": 5.0}, True),
        (20, {"fps": 5.0}, False),
        (40, {"stride": 2}, True),
        (3, {"stride": None}, True),
    ],
)
def test_as_many_rows_as_the_video_can_have(tmp_path, rows, options, fits):
    features = opened(tmp_path, numbered(rows), **{"stride": STRIDE, **options})
    if fits:
        features.window(Resize(num_snippets=4), record(), 0)
        return
    with pytest.raises(DataError, match=rf"'v': .*v\.npy has {rows} rows, but a video of 8\.0 s at .* about \d+ of"):
        features.window(Resize(num_snippets=4), record(), 0)


def test_nan_is_named(tmp_path):
    array = numbered()
    array[7, 1] = np.nan
    with pytest.raises(DataError, match=r"'v': .*v\.npy holds NaN or infinite values"):
        opened(tmp_path, array).window(Resize(num_snippets=20), record(), 0)


def test_another_number_of_channels_is_named_with_the_key(tmp_path):
    features = opened(tmp_path, numbered())
    np.save(tmp_path / "v.npy", numbered(3, ROWS))
    with pytest.raises(DataError, match=r"has 20 channels, expected 3 \(config\.backbone\.channels\).*channels_first"):
        features.window(Resize(num_snippets=4), record(), 0)


def test_a_window_after_the_last_row_keeps_one_snippet(tmp_path):
    """Of 100 rows two may be missing, and these are all that the last window asks for."""
    features = opened(tmp_path, numbered(98))
    policy = SlidingWindow(num_snippets=2, snippet_stride=STRIDE, overlap=0)
    window, rows = features.window(policy, record(seconds=40.0), 49)
    assert (window.num_valid_snippets, rows[:, 0].tolist()) == (1, [97, 97])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 0}, "features.stride = 0 must be at least 1"),
        ({"offset_frames": 8.0}, "features.offset_frames = 8.0 .* needs features.stride"),
        ({"stride": 4, "offset_frames": -1.0}, "features.offset_frames = -1.0 must be at least 0"),
        ({"fps": 30.0}, "features.fps = 30.0 .* needs features.stride"),
        ({"stride": 4, "fps": 0.0}, "features.fps = 0.0 must be a positive number"),
        ({"folder": ()}, "names no folder"),
    ],
)
def test_options_that_say_nothing_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        FeatureConfig(**{"folder": "x", **options})


# --- manifests


def manifest(**changes):
    entry = VideoEntry(rows=ROWS, start_sec=0.0, seconds_per_snippet=0.4, duration_sec=8.0, num_frames=FRAMES, fps=FPS)
    found = Manifest(
        identity={"seed": 0},
        checkpoint={"sha256": "abcdef0123", "step": 5},
        channels=3,
        stride=STRIDE,
        offset_frames=0,
        videos={"v": entry},
        skipped={},
    )
    return dataclasses.replace(found, **changes)


def test_a_manifest_reads_back_with_what_was_finished_after_it(tmp_path):
    write_manifest(tmp_path, manifest())
    assert read_manifest(tmp_path) == manifest()
    entry = manifest().videos["v"]
    note_video(tmp_path, 1, "w", entry)
    with (tmp_path / ".videos-1.jsonl").open("a") as file:
        file.write('{"video_id": "x", "ro')  # killed while it wrote
    assert read_manifest(tmp_path).videos == {"v": entry, "w": entry}
    note_video(tmp_path, 1, "y", entry)  # by the run that goes on
    assert read_manifest(tmp_path).videos == {"v": entry, "w": entry, "y": entry}
    assert read_manifest(tmp_path / "nothing") is None


def test_the_manifest_says_when_rows_lie(tmp_path):
    np.save(tmp_path / "v.npy", numbered())
    write_manifest(tmp_path, manifest())
    features = opened(tmp_path, stride=None)
    assert features.channels == 3
    silent = record(fps=None)
    assert features.total_frames(silent) == FRAMES
    _, rows = features.window(SlidingWindow(num_snippets=8, snippet_stride=STRIDE, overlap=0.5), silent, 2)
    assert rows[:, 0].tolist() == list(range(8, 16))


def test_a_video_that_the_manifest_lacks_has_no_features(tmp_path):
    np.save(tmp_path / "v.npy", numbered())
    write_manifest(tmp_path, manifest(videos={}))
    assert opened(tmp_path).places == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 8}, r"features\.stride = 8, but the manifest of .* says 4"),
        ({"stride": 4, "offset_frames": 2.0}, r"features\.offset_frames = 2\.0, but the manifest of .* says 0"),
        ({"stride": 4, "fps": 30.0}, r"features\.fps = 30, but the manifest"),
        ({"checkpoint": "fedc"}, r"features\.checkpoint = 'fedc', but the manifest of .* names abcdef0123"),
    ],
)
def test_a_config_that_its_manifest_contradicts_is_refused(tmp_path, options, message):
    np.save(tmp_path / "v.npy", numbered())
    write_manifest(tmp_path, manifest())
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path, **{"stride": None, **options})
    opened(tmp_path, stride=STRIDE, offset_frames=0.0, checkpoint="abcd")


def test_files_that_their_manifest_contradicts_are_refused(tmp_path):
    np.save(tmp_path / "v.npy", numbered(ROWS - 1))
    write_manifest(tmp_path, manifest())
    with pytest.raises(DataError, match="has 19 rows, its manifest says 20"):
        opened(tmp_path).window(Resize(num_snippets=4), record(), 0)
    np.save(tmp_path / "v.npy", numbered(ROWS))
    with pytest.raises(DataError, match=r"extracted from a video of 8\.0 s, the annotation says 30\.0 s"):
        opened(tmp_path).window(Resize(num_snippets=4), record(seconds=30.0), 0)


@pytest.mark.parametrize("text", ["", "[]", '{"format": "x"}', '{"format": "re2tal features 1", "videos": {"v": {}}}'])
def test_a_damaged_manifest_is_named(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json: "):
        read_manifest(tmp_path)


# --- data sets and batches


@pytest.fixture
def annotations(tmp_path):
    """Three videos of 8 s at 10 fps, with features of the first two."""
    database = {
        f"video {i}": {
            "subset": "training",
            "duration": FRAMES / FPS,
            "frame": FRAMES,
            "annotations": [{"segment": [1.0, 3.0], "label": "a"}],
        }
        for i in range(3)
    }
    (tmp_path / "annotations.json").write_text(json.dumps({"database": database}))
    (tmp_path / "features").mkdir()
    np.save(tmp_path / "features" / "video 0.npy", numbered())
    np.save(tmp_path / "features" / "v_video 1.npy", numbered())
    return tmp_path


def dataset(folder, **options):
    features = FeatureConfig(folder=str(folder / "features"), stride=STRIDE)
    return activitynet(annotations=str(folder / "annotations.json"), subset="training", features=features, **options)


def test_videos_without_features_are_named_or_left_out_as_those_without_a_file(annotations):
    with pytest.raises(DataError, match=r"1 of 3 videos have no file in .*features: video 2\. .*\.npy.*missing_videos"):
        dataset(annotations)
    found = dataset(annotations, missing_videos="skip")
    assert [r.video_id for r in found.records] == ["video 0", "video 1"]
    assert dict(found.findings) == {"features_missing": 1}
    assert len(found.ground_truth["database"]) == 3


def loader(data, policy, *, train=False, batch_size=2, **options):
    config = LoaderConfig(height=None, width=None, threads=1, **options)
    return Loader(data, policy, config, seed=0, train=train, batch_size=batch_size)


def test_batches_of_features_have_the_fields_of_batches_of_frames(annotations):
    data = dataset(annotations, missing_videos="skip")
    (batch,) = loader(data, Resize(num_snippets=ROWS), batch_size=3)
    assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == {
        "video": ((3, ROWS, 3), "float32"),
        "frame_size": ((3, 2), "float32"),
        "mask": ((3, ROWS), "bool"),
        "gt_segments": ((3, 1, 2), "float32"),
        "gt_labels": ((3, 1), "int32"),
        "gt_mask": ((3, 1), "bool"),
        "window": ((3,), "int32"),
    }
    np.testing.assert_array_equal(batch["video"], [numbered(), numbered(), 0 * numbered()])
    assert batch["window"].tolist() == [0, 1, -1]
    np.testing.assert_allclose(batch["gt_segments"][0], [[2.5, 7.5]])


def test_features_go_through_worker_processes(annotations):
    data = dataset(annotations, missing_videos="skip")
    policy = SlidingWindow(num_snippets=8, snippet_stride=STRIDE, overlap=0.5)
    here, there = (list(loader(data, policy, workers=workers)) for workers in (0, 1))
    assert len(here) == 4
    for one, other in zip(here, there, strict=True):
        np.testing.assert_array_equal(one["video"], other["video"])


def test_damaged_features_are_skipped_by_policy(annotations):
    (annotations / "features" / "v_video 1.npy").write_bytes(b"")
    data = dataset(annotations, missing_videos="skip")
    with pytest.raises(DataError, match=r"Video 'video 1': .*v_video 1\.npy: its features cannot be read"):
        list(loader(data, Resize(num_snippets=4)))
    source = loader(data, Resize(num_snippets=4), on_error="skip")
    (batch,) = source
    assert batch["window"].tolist() == [0, -1]
    assert list(source.skipped) == ["video 1"]


def test_a_policy_in_frames_needs_a_stride(annotations):
    features = FeatureConfig(folder=str(annotations / "features"))
    data = dataset(annotations, missing_videos="skip")
    data = dataclasses.replace(data, features=open_features(features, [r.video_id for r in data.records]))
    with pytest.raises(ConfigError, match=r"config\.eval\.policy walks in steps of frames.*features\.stride"):
        loader(data, SlidingWindow(num_snippets=8, snippet_stride=STRIDE, overlap=0.5))


# --- settings and detector


def feature_config(folder, **changes):
    config = changed(
        tiny_config(folder),
        data__features={"folder": str(folder / "features")},
        backbone={"name": "features", "channels": 5, "checkpoint": None},
        detector={"pixel_mean": None, "pixel_std": None, "snippet_loss_weight": 0.0},
        parameter_groups={"localizer_lr": 1e-2, "backbone_lr": None, "weight_decay": 0.05},
        train__mirror=None,
    )
    for split in ("train", "eval"):
        config[split] |= {"augment": None, "loader": {"height": None, "width": None, "threads": 1}}
    return changed(config, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data__features": None},
            "config.backbone.name = 'features' leaves the backbone out, but config.data.features",
        ),
        ({"backbone__name": "vit_small"}, "config.data.features stands in the place of the videos, but .*'vit_small'"),
        ({"train__augment": {"height": 8, "width": 8}}, "config.train.augment needs frames"),
        ({"eval__loader": {"height": 8, "width": 8}}, "config.eval.loader.height needs frames"),
        ({"eval__loader": {"height": 8, "width": None}}, "height = 8, width = None: both are None for features"),
        ({"detector__pixel_mean": (1.0, 1.0, 1.0)}, "config.detector.pixel_mean needs frames"),
        ({"backbone__checkpoint": "runs/x"}, "config.backbone.checkpoint needs frames"),
        ({"parameter_groups__backbone_lr": 1e-3}, "config.parameter_groups.backbone_lr needs frames"),
        (
            {"train__mirror": {"flip": 0.5, "reverse": 0.5, "flip_classes": {}, "reverse_classes": {}}},
            "config.train.mirror needs frames",
        ),
        ({"data__features": {"foldr": "x"}}, "Unknown key config.data.features.foldr. Did you mean 'folder'"),
    ],
)
def test_sections_for_frames_and_for_features_do_not_mix(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        resolved_config(read_settings(feature_config(tmp_path, **changes)))


@pytest.mark.parametrize(("key", "value"), [("train__augment", None), ("detector__pixel_mean", None)])
def test_frames_need_what_features_leave_out(tmp_path, key, value):
    with pytest.raises(ConfigError, match=f"config.{key.replace('__', '.')} = None is for features"):
        read_settings(changed(tiny_config(tmp_path), **{key: value}))


def test_a_config_with_features_reads_back_as_itself(tmp_path):
    resolved = resolved_config(read_settings(feature_config(tmp_path)))
    assert resolved["data"]["features"]["channels_first"] is False
    assert resolved_config(read_settings(json.loads(json.dumps(resolved)))) == resolved


class Localizer(nnx.Module):
    """Gives back what it gets."""

    def __call__(self, features, mask, *, key=None):
        return features


def test_features_reach_the_localizer_unchanged():
    detector = Detector(
        Precomputed(channels=5),
        Localizer(),
        num_snippets=8,
        num_classes=2,
        pixel_mean=None,
        pixel_std=None,
        rngs=nnx.Rngs(0),
    )
    assert not nnx.to_flat_state(nnx.state(detector, nnx.Param))
    features = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 5)), jnp.float32)
    for key in (None, jax.random.key(0)):
        outputs, passed = detector(features, jnp.ones((2, 8), bool), key=key)
        np.testing.assert_array_equal(outputs, features)
        np.testing.assert_array_equal(passed, features)
    with pytest.raises(ConfigError, match=r"config\.backbone\.channels = 5, but the features have 4"):
        detector.features(features[..., :4])


def test_a_config_of_features_is_ready_for_its_data(tmp_path):
    """Its blueprint has no backbone, and its loss can be traced."""
    settings = read_settings(feature_config(tmp_path))
    blueprint = draw_blueprint(settings, make_mesh(settings.mesh, jax.devices()[:1]))
    check_shapes(settings, blueprint)
    assert {path.split(".")[0] for path in blueprint.model.parameters} == {"localizer"}
    assert abstract_batch(settings, max_segments=1).video.shape == (8, 8, 5)


@pytest.mark.parametrize("name", ["demo_features", "anet_features", "thumos_features"])
def test_a_recipe_on_features_is_that_of_its_paper_and_can_run(name):
    settings = read_settings(read_config_file(ROOT / "configs" / f"{name}.py"))
    blueprint = draw_blueprint(settings, make_mesh(replace(settings.mesh, cpu_devices=1), jax.devices()[:1]))
    check_shapes(settings, blueprint)
    assert not [row.path for row in blueprint.optimizer.table() if row.frozen]


@pytest.mark.parametrize("rate", [1e-2, None])
def test_a_frozen_backbone_is_frozen_whole(tmp_path, rate):
    groups = {"parameter_groups__freeze_backbone": True, "parameter_groups__backbone_lr": rate}
    settings = read_settings(changed(tiny_config(tmp_path), **groups, parameter_groups__freeze_backbone_norms=True))
    rows = draw_blueprint(settings, make_mesh(settings.mesh, jax.devices()[:1])).optimizer.table()
    assert {row.path for row in rows if row.frozen} == {row.path for row in rows if row.path.startswith("backbone.")}
    assert {row.group for row in rows if row.frozen} == {"backbone"}
