"""`--mode extract`: what is written, resumed, shared among processes, refused; and training from it."""

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from re2tal_jax.data.extraction import LOCK, FeatureFolder, join_windows
from re2tal_jax.data.manifest import read_manifest
from re2tal_jax.data.sampling import Resize
from re2tal_jax.errors import CheckpointError, ConfigError, DataError
from re2tal_jax.experiment import draw_blueprint, make_loader, make_preprocess, open_split, resolved_config
from re2tal_jax.modes.extract import extract
from re2tal_jax.settings import read_settings
from re2tal_jax.training.sharding import make_mesh, put_batch
from re2tal_jax.training.step import make_train_step
from re2tal_jax.weights import save_weights
from tests.system import FPS, FRAMES, NUM_TRAIN, NUM_VALIDATION, changed, once
from tests.test_features import feature_config

pytest_plugins = "tests.system_fixtures"
pytestmark = pytest.mark.usefixtures("compiled_once")

T = 8  # snippets of the tiny config
ALL = NUM_TRAIN + NUM_VALIDATION


def test_a_snippet_is_taken_from_the_window_in_which_it_is_farthest_from_an_edge():
    """Windows of 6 snippets at 0, 3 and 5 of 11; the video's own ends are no edges."""
    windows = [(first, np.full((6, 1), 1 + number)) for number, first in enumerate((0, 3, 5))]
    # distances: snippet 3 is 2 from the right edge of window 0, 0 from the left of window 1; 4: 1 and 1, the earlier;
    # 5: 0, 2 and 0; 6: 2 and 1; 7: 1 and 2 of the last, whose right edge is the video's end
    expected = [1, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3]
    assert join_windows(windows)[:, 0].tolist() == expected
    assert join_windows(windows[::-1])[:, 0].tolist() == expected
    assert join_windows([(0, np.ones((2, 1)))]).shape == (2, 1)


@pytest.fixture(scope="module")
def config(config):
    """The tiny config made smaller still, for this compiles often; nothing of videos and backbone is random."""
    small = {"backbone__depths": (1,), "localizer__arch": (1, 0, 0), "localizer__regression_range": ((0, 10000),)}
    off = {"backbone__drop_path_rate": 0.0, "train__augment__crop": 0.0, "train__mirror": None}
    return changed(config, **small, **off)


@pytest.fixture(scope="module")
def extracted(tmp_path_factory, config, compiled_once):
    """Folder of the features of all tiny videos, from a random backbone; not to be changed."""
    return once(tmp_path_factory, "extracted", lambda folder: run(config, folder)) / "features"


def run(config, workdir, **options):
    return extract(read_settings(config), config, workdir, **options)


def rows_of(folder, video_id):
    return np.load(folder / f"{video_id}.npy")


def test_every_video_has_its_snippets_and_its_line_in_the_manifest(extracted, config):
    manifest = read_manifest(extracted)
    assert len(manifest.videos) == ALL
    assert sorted(p.name for p in extracted.iterdir()) == sorted(
        ["manifest.json", *(f"{v}.npy" for v in manifest.videos)]
    )
    entry = manifest.videos["training_3"]
    assert (entry.rows, entry.num_frames, entry.fps, entry.duration_sec) == (T, FRAMES, FPS, FRAMES / FPS)
    assert (entry.start_sec, entry.seconds_per_snippet) == (0.0, FRAMES / FPS / T)
    assert (manifest.stride, manifest.offset_frames, manifest.channels) == (None, 0, 8)
    assert manifest.identity["policy"] == {"name": "resize", "num_snippets": T, "frames_per_snippet": 1}
    assert manifest.identity["backbone"]["name"] == "video_swin_tiny"
    assert manifest.checkpoint["source"] == "random"
    assert len(manifest.checkpoint_sha256) == 64
    rows = rows_of(extracted, "training_3")
    assert (rows.shape, rows.dtype.name) == ((T, 8), "float32")


def test_rows_are_the_features_that_the_localizer_would_be_given(extracted, config):
    settings = read_settings(config)
    blueprint = draw_blueprint(settings, make_mesh(settings.mesh, jax.devices()))
    loader = make_loader(settings, open_split(settings, settings.eval, train=False), train=False)
    batch = next(iter(loader))
    preprocess = make_preprocess(settings.eval, classes=())

    @jax.jit
    def features(params, batch):
        return blueprint.model.merge(params).features(preprocess(batch, None)[0])

    mesh = make_mesh(settings.mesh, jax.devices())
    expected = features(blueprint.spec.create().ema_params, put_batch(batch, mesh))
    for number, rows in zip(batch["window"].tolist(), np.asarray(expected), strict=True):
        if number >= 0:
            found = rows_of(extracted, loader.windows[number].record.video_id)
            np.testing.assert_allclose(found, rows, atol=2e-6)
            assert np.abs(rows).max() > 0.1


@pytest.fixture
def copied(extracted, tmp_path) -> Path:
    return Path(shutil.copytree(extracted, tmp_path / "features"))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npy")}


def test_the_same_command_makes_only_what_is_missing(copied, extracted, config, tmp_path, caplog):
    for name in ("training_1", "validation_17"):
        (copied / f"{name}.npy").unlink()
    before = times(copied)
    caplog.set_level("INFO")
    run(config, tmp_path / "run", out=str(copied))
    assert f"features of {ALL} videos, 2 still to do" in caplog.text
    after = times(copied)
    assert {name: after[name] for name in before} == before
    assert content(copied) == content(extracted)


def test_a_stopped_extraction_keeps_every_finished_video(tmp_path, config, monkeypatch):
    written = []
    write = FeatureFolder.write

    def failing(self, ref, rows):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(ref.record.video_id)
        return write(self, ref, rows)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureFolder, "write", failing)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path)
    folder = tmp_path / "features"
    assert sorted(read_manifest(folder).videos) == sorted(written)
    before = times(folder)
    run(config, tmp_path)
    assert len(read_manifest(folder).videos) == ALL
    assert {name: value for name, value in times(folder).items() if name in before} == before


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"seed": 4}, {}, r"holds features with checkpoint\.sha256 = '[0-9a-f]{64}', this command .* '[0-9a-f]{64}'"),
        ({"eval__augment__center": True}, {}, r"augment\.center = False, this command makes them with True"),
        ({}, {"dtype": "float16"}, r"dtype = 'float32', this command makes them with 'float16'.*--out.*--overwrite"),
    ],
)
def test_features_of_another_backbone_or_config_are_not_mixed_in(
    copied, extracted, config, tmp_path, changes, options, message
):
    with pytest.raises(CheckpointError, match=message):
        run(changed(config, **changes), tmp_path / "run", out=str(copied), **options)
    assert content(copied) == content(extracted)


def test_an_extraction_without_a_finished_video_binds_no_later_one(tmp_path):
    folder = FeatureFolder(tmp_path / "features", Resize(num_snippets=T), 0)
    with folder.claimed():
        for dtype in ("float32", "float16"):
            folder.prepare({"dtype": dtype}, {"sha256": "0"}, 8, overwrite=False)
            assert read_manifest(folder.folder).identity == {"dtype": dtype}


def test_overwriting_makes_all_anew(copied, config, tmp_path):
    run(config, tmp_path / "run", out=str(copied), dtype="float16", overwrite=True)
    assert {rows_of(copied, video).dtype.name for video in read_manifest(copied).videos} == {"float16"}
    assert read_manifest(copied).identity["dtype"] == "float16"


def test_files_that_no_extraction_wrote_are_left_alone(tmp_path, config):
    np.save(tmp_path / "training_0.npy", np.zeros((2, 2)))
    with pytest.raises(DataError, match="holds npy files without a manifest"):
        run(config, tmp_path / "run", out=str(tmp_path), overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["training_0.npy"]


def test_two_extractions_do_not_write_into_one_folder(copied, extracted, config, tmp_path):
    for overwrite in (False, True):
        with FeatureFolder(copied, Resize(num_snippets=T), 0).claimed():
            before = content(copied)
            with pytest.raises(DataError, match=r"features: another extraction is at work there.*--out"):
                run(config, tmp_path / "run", out=str(copied), overwrite=overwrite)
            assert content(copied) == before
    assert content(copied) == content(extracted)
    (copied / LOCK).write_text("")  # what a kill leaves stops nobody
    with FeatureFolder(copied, Resize(num_snippets=T), 0).claimed():
        pass
    assert content(copied) == content(extracted)


def test_names_cannot_lead_out_of_the_folder(tmp_path):
    folder = FeatureFolder(tmp_path, Resize(num_snippets=2), 0)
    assert folder.path("day 1/clip") == tmp_path / "day 1" / "clip.npy"
    for name in ("../x", "/x", "a/../../x", ""):
        with pytest.raises(DataError, match="no file can have this name"):
            folder.path(name)


def test_a_given_backbone_is_taken_and_named(extracted, config, tmp_path):
    """Parameters that are those of the seed give what the random backbone gave; the manifest says whose they are."""
    settings = read_settings(config)
    blueprint = draw_blueprint(settings, make_mesh(settings.mesh, jax.devices()))
    params = {path: np.asarray(value) for path, value in blueprint.spec.create().params.items()}
    save_weights(tmp_path / "weights", params, {"config": resolved_config(settings), "whole": True})
    given = str(tmp_path / "weights")
    run(config, tmp_path / "elsewhere", checkpoint=given, out=str(tmp_path / "out"))
    manifest = read_manifest(tmp_path / "out")
    assert manifest.checkpoint == {**read_manifest(extracted).checkpoint, "source": "weights", "step": 0}
    np.testing.assert_array_equal(rows_of(tmp_path / "out", "training_0"), rows_of(extracted, "training_0"))
    with pytest.raises(CheckpointError, match=r"--checkpoint = .*weights' holds another backbone"):
        run(changed(config, backbone__embed_dim=16), tmp_path / "x", checkpoint=given)


def test_each_process_does_its_videos_and_the_manifest_has_all(tmp_path, config, extracted, monkeypatch):
    module = importlib.import_module("re2tal_jax.modes.extract")
    monkeypatch.setattr(module.multihost_utils, "sync_global_devices", lambda name: None)
    counts = []
    for index in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(module.jax, "process_index", lambda index=index: index)
            patch.setattr(module.jax, "process_count", lambda: 2)
            # half of a batch of 16 each; only this module and what it checks see two processes
            run(changed(config, eval__batch_size=16, train__batch_size=16), tmp_path)
        counts.append(len(read_manifest(tmp_path / "features").videos))
    assert counts == [ALL // 2, ALL]
    assert len(json.loads((tmp_path / "features" / "manifest.json").read_text())["videos"]) == ALL
    np.testing.assert_allclose(
        rows_of(tmp_path / "features", "training_1"), rows_of(extracted, "training_1"), atol=2e-6
    )


def damaged(tmp_path, tiny_data, config, on_error):
    shutil.copytree(tiny_data, tmp_path / "data")
    (tmp_path / "data" / "videos" / "training_5.mp4").write_bytes(b"")
    data = {**config["data"], "videos": str(tmp_path / "data" / "videos")}
    return changed(config, data=data, eval__loader__on_error=on_error)


def test_a_damaged_video_is_named_and_left_out(tmp_path, tiny_data, config, extracted, caplog):
    run(damaged(tmp_path, tiny_data, config, "skip"), tmp_path / "run")
    manifest = read_manifest(tmp_path / "run" / "features")
    assert manifest.videos.keys() == read_manifest(extracted).videos.keys() - {"training_5"}
    assert "training_5.mp4: the video file is empty" in manifest.skipped["training_5"]
    assert "1 videos could not be read and have no features: training_5" in caplog.text


def test_a_damaged_video_stops_it_and_what_is_finished_stays(tmp_path, tiny_data, config):
    config = damaged(tmp_path, tiny_data, config, "error")
    with pytest.raises(DataError, match=r"Video 'training_5': .*training_5\.mp4"):
        run(config, tmp_path / "run")
    assert (tmp_path / "run" / "features" / "manifest.json").is_file()


def test_sliding_windows_give_a_row_for_every_snippet_of_the_video(tmp_path, config):
    """24 frames, a snippet every 2: 12 rows, from windows of 8 at 0 and 4."""
    policy = {"name": "sliding_window", "snippet_stride": 2, "overlap": 0.5, "require_segment": True}
    config = changed(config, eval__policy=policy, postprocess__suppress_in="video")
    run(config, tmp_path)
    manifest = read_manifest(tmp_path / "features")
    assert len(manifest.videos) == ALL
    entry = manifest.videos["training_0"]
    assert (manifest.stride, entry.rows, entry.seconds_per_snippet) == (2, 12, 2 / FPS)
    rows = rows_of(tmp_path / "features", "training_0")
    assert rows.shape == (12, 8)
    # what a localizer is given of it: windows of 8 rows, as they are
    settings = read_settings(feature_config_for(config, tmp_path / "features", eval__policy__require_segment=False))
    data = open_split(settings, replace(settings.eval, subset="training"), train=False)
    batch = next(iter(make_loader(settings, data, train=False)))
    np.testing.assert_array_equal(batch["video"][0], rows[:T])
    np.testing.assert_array_equal(batch["video"][1], rows[4:])
    assert batch["mask"].all()


def feature_config_for(config, folder, **changes):
    """The config with its backbone left out, features read from the folder."""
    features = feature_config(Path("x"))
    config = changed(
        config,
        data={**config["data"], "features": {"folder": str(folder)}},
        backbone={"name": "features", "channels": 8, "checkpoint": None},
        detector={**features["detector"], "snippet_loss_weight": config["detector"]["snippet_loss_weight"]},
        parameter_groups=features["parameter_groups"],
        train__mirror=None,
    )
    for split in ("train", "eval"):
        config[split] |= {"augment": None, "loader": features[split]["loader"]}
    return changed(config, **changes)


def losses_of(config, steps):
    """Losses of the first steps, and the parameters before and after them."""
    settings = read_settings(changed(config, mesh={}))
    mesh = make_mesh(settings.mesh, jax.devices()[:1])  # one device compiles in half the time
    blueprint = draw_blueprint(settings, mesh)
    data = open_split(settings, settings.train, train=True)
    loader = make_loader(settings, data, train=True)
    step = make_train_step(blueprint.spec, make_preprocess(settings.train, data.classes), mesh)
    state = blueprint.spec.create({})
    begun = {path: np.asarray(value) for path, value in state.params.items()}
    found, batches = [], iter(loader)
    for _ in range(steps):
        state, metrics = step(state, put_batch(next(batches), mesh), jax.random.key(1))
        found.append([float(metrics["loss/total"]), float(metrics["grad_norm"])])
    batches.close()
    return found, begun, {path: np.asarray(value) for path, value in state.params.items()}


@pytest.mark.slow  # compiles two training steps
def test_training_on_features_is_training_on_videos_with_the_backbone_frozen(extracted, config):
    """One seed, nothing augmented: both begin with the same localizer."""
    frozen = changed(config, parameter_groups__freeze_backbone=True)
    end_to_end, start, after = losses_of(frozen, 3)
    changed_paths = {path for path, value in start.items() if not np.array_equal(value, after[path])}
    assert {path.split(".")[0] for path in changed_paths} == {"localizer", "snippet_head"}
    on_features, begun, _ = losses_of(feature_config_for(config, extracted), 3)
    assert begun.keys() == {path for path in start if not path.startswith("backbone.")}
    for path, value in begun.items():
        np.testing.assert_array_equal(value, start[path], err_msg=path)
    np.testing.assert_allclose(on_features, end_to_end, rtol=2e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "extract", "--dtype", "float8"], "--dtype 'float8' is no type of features"),
        (["--mode", "eval", "--dtype", "float16"], "--dtype belongs to --mode extract; the mode is 'eval'"),
    ],
)
def test_the_command_line_knows_what_belongs_to_it(run_main, tmp_path, config, arguments, message):
    from tests.system import write_config

    file = write_config(tmp_path / "c.py", config)
    done = run_main("--config", file, "--workdir", tmp_path / "run", *arguments)
    assert done.code == 1
    assert message in done.err


def test_features_are_not_extracted_from_features(tmp_path):
    with pytest.raises(ConfigError, match="needs a backbone and videos; this config reads features"):
        run(feature_config(tmp_path), tmp_path / "run")
