import dataclasses
import itertools
import json

import numpy as np
import pytest

from re2tal_jax.data.container import probe
from re2tal_jax.data.scenes import CLASSES, FLIP, LENGTHS, REVERSE, Actor, draw_scene, paint, render, states
from re2tal_jax.data.synthetic import render_dataset, synthetic
from re2tal_jax.errors import ConfigError, DataError

SEED = 5


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    render_dataset(folder, num_train=5, num_validation=3, seed=SEED, processes=1)
    return folder


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(np.random.default_rng((SEED, 0, i))) for i in range(1500)]


@pytest.fixture(scope="module")
def actors(scenes):
    """All instances, with the number of frames of their videos."""
    return [(actor, scene.num_frames) for scene in scenes for actor in scene.instances]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_annotation_tells_what_was_drawn(root):
    database = json.loads((root / "annotations.json").read_text())["database"]
    assert sorted(v["subset"] for v in database.values()) == ["training"] * 5 + ["validation"] * 3
    for number, (name, video) in enumerate(database.items()):
        key = (SEED, 0, number) if number < 5 else (SEED, 1, number - 5)
        scene = draw_scene(np.random.default_rng(key))
        info = probe(root / "videos" / f"{name}.mp4")
        assert (info.num_frames, info.fps) == (video["frame"], scene.fps) == (scene.num_frames, scene.fps)
        assert info.duration_sec == pytest.approx(video["duration"], abs=1e-3)  # mp4 counts in milliseconds
        assert f"{info.width}x{info.height}" == video["resolution"]
        drawn = [(a.label, a.start / info.fps, a.end / info.fps) for a in scene.instances]
        assert [(a["label"], *a["segment"]) for a in video["annotations"]] == drawn


def test_it_opens_through_the_door_of_real_data(root):
    dataset = synthetic(root=str(root), subset="validation", num_train=5, num_validation=3, seed=SEED)
    assert dataset.classes == CLASSES == tuple(sorted(CLASSES))
    assert [record.video_id for record in dataset.records] == [f"synthetic_validation_0000{i}" for i in range(3)]
    assert not dataset.findings
    assert all(dataset.video_paths[record.video_id].is_file() for record in dataset.records)


def test_a_killed_run_is_taken_up_and_gives_the_same_files(root, tmp_path):
    arguments = {"num_train": 5, "num_validation": 3, "seed": SEED}
    render_dataset(tmp_path, **(arguments | {"num_train": 2}))  # as far as a run may come before it is killed
    (tmp_path / "annotations.json").unlink()
    first = tmp_path / "videos" / "synthetic_training_00000.mp4"
    before = first.stat().st_mtime_ns
    render_dataset(tmp_path, **arguments)
    assert contents(tmp_path) == contents(root)
    assert first.stat().st_mtime_ns == before


def test_two_processes_render_the_same_files(root, tmp_path):
    render_dataset(tmp_path, num_train=5, num_validation=8, seed=SEED, processes=2)
    mine, one_process = contents(tmp_path), contents(root)
    del one_process["annotations.json"]
    assert one_process.items() <= mine.items()


def test_training_and_validation_never_share_a_video(root):
    videos = [content for name, content in contents(root).items() if name.endswith(".mp4")]
    assert len(set(videos)) == 8


def test_a_folder_holds_one_seed(root):
    with pytest.raises(DataError, match=r"'seed': 5.* asked for .*'seed': 6.*another folder"):
        render_dataset(root, num_train=1, num_validation=1, seed=6)


def test_a_subset_without_videos_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="num_validation = 0"):
        render_dataset(tmp_path, num_train=1, num_validation=0, seed=0)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file.*cannot write the synthetic data set"):
        render_dataset(tmp_path / "file" / "root", num_train=1, num_validation=1, seed=0)


def test_instances_are_as_many_and_as_long_as_promised(scenes):
    counts = np.bincount([len(scene.instances) for scene in scenes], minlength=5)
    assert len(counts) == 5  # never more than four
    assert 0.07 < counts[0] / len(scenes) < 0.13
    assert (counts[1:] > 0.15 * len(scenes)).all()
    for scene in scenes:
        spans = [(a.start, a.end) for a in scene.instances]
        assert all(end < start for (_, end), (start, _) in itertools.pairwise(spans))
        assert all(0 <= s < e <= scene.num_frames for s, e in spans)
        shares = [(e - s) / scene.num_frames for s, e in spans]
        assert all(LENGTHS[0] <= share <= LENGTHS[1] for share in shares)
    assert len({(s.height, s.width) for s in scenes}) >= 4
    assert len({s.fps for s in scenes}) >= 3
    assert 0.3 < np.mean([len(s.actors) > len(s.instances) for s in scenes]) < 0.9  # distractors


def test_motion_between_two_of_96_sampled_frames_does_not_depend_on_the_rate(actors):
    for label, low, high, column in [("right", 0.9 / 32, 1.6 / 32, 0), ("clockwise", 0.157, 0.280, 3)]:
        moved = []
        for actor, num_frames in actors:
            if actor.label == label and actor.end - actor.start >= 4:
                track = np.unwrap(states(actor, num_frames)[:, column], period=[1, 1, 1, 2 * np.pi][column])
                moved.append((track[3] - track[0]) / 3 * num_frames / 96)
        assert len(moved) > 100
        assert low <= min(moved) < max(moved) <= high


def largest_gap(sample, everyone):
    """Return the Kolmogorov-Smirnov distance of two samples, in units of what chance exceeds once in a hundred."""
    grid = np.sort(everyone)
    below = [np.searchsorted(np.sort(x), grid, side="right") / len(x) for x in (sample, everyone)]
    return np.abs(below[0] - below[1]).max() / (1.63 / np.sqrt(len(sample)))


def test_no_single_frame_shows_what_an_actor_does(actors):
    rng = np.random.default_rng(0)
    labels = np.array([actor.label for actor, _ in actors])
    tracks = [states(actor, num_frames) for actor, num_frames in actors]
    at = [int(rng.integers(len(track) - 1)) for track in tracks]
    single = np.stack([track[i] for track, i in zip(tracks, at, strict=True)])
    change = np.stack([track[i + 1] - track[i] for track, i in zip(tracks, at, strict=True)])
    for label in CLASSES:
        for column in range(4):
            assert largest_gap(single[labels == label, column], single[:, column]) < 1
        gaps = [largest_gap(change[labels == label, column], change[:, column]) for column in range(4)]
        assert max(gaps) > 3  # the same test on two frames sees the motion


def test_no_linear_reading_of_single_pictures_finds_the_class(actors):
    rng = np.random.default_rng(1)
    pictures, labels = [], []
    for actor, num_frames in actors[:2400]:
        track = states(actor, num_frames)
        picture = paint(np.zeros((1, 64, 64, 3), np.float32), actor, track[[rng.integers(len(track))]])[0]
        pictures.append(picture.reshape(8, 8, 8, 8, 3).mean(axis=(1, 3)).ravel())
        labels.append(CLASSES.index(actor.label))
    features = np.column_stack([pictures, np.ones(len(pictures))]) / 255
    features = np.column_stack([features, features**2])
    targets = np.eye(6)[labels]
    train, test = slice(0, 1600), slice(1600, None)
    penalty = np.eye(features.shape[1])
    weights = np.linalg.solve(features[train].T @ features[train] + penalty, features[train].T @ targets[train])
    accuracy = ((features[test] @ weights).argmax(1) == np.array(labels[test])).mean()
    assert accuracy < 1 / 6 + 3 * np.sqrt(5 / 36 / 800)  # chance, and three standard deviations


def around(a, b):
    """Return how far two tracks are apart; x, y and angle go round."""
    difference = np.abs(a - b)
    return np.minimum(difference, np.abs(difference - [1, 1, 9, 2 * np.pi])).max()


def test_mirrored_and_reversed_actors_are_those_of_the_swapped_class():
    actor = Actor(
        label="", start=3, end=40, x=0.3, y=0.6, phase=0.2, angle=0.7, speed=0.02, body=(9, 9, 9), head=(7, 7, 7)
    )
    for label in CLASSES:
        track = states(dataclasses.replace(actor, label=label), 96)
        twin = dataclasses.replace(actor, label=FLIP.get(label, label), x=1 - actor.x, angle=np.pi - actor.angle)
        mirrored = (track * [-1, 1, 1, -1] + [1, 0, 0, np.pi]) % [1, 1, 9, 2 * np.pi]
        assert around(states(twin, 96), mirrored) < 1e-9
        x, y, _, angle = track[-1]
        end = actor.phase + (len(track) - 1) * actor.speed * {"grow": 1, "shrink": -1}.get(label, 0)
        twin = dataclasses.replace(actor, label=REVERSE[label], x=x, y=y, phase=end, angle=angle)
        assert around(states(twin, 96), track[::-1]) < 1e-9


def test_pictures_move_as_the_class_says():
    scene = draw_scene(np.random.default_rng(0))
    actor = Actor(
        label="right", start=0, end=96, x=0.25, y=0.5, phase=0.0, angle=0, speed=0.02, body=(250,) * 3, head=(250,) * 3
    )
    scene = dataclasses.replace(scene, num_frames=96, actors=(actor,), color=(60, 60, 60), height=64, width=64)
    frames = np.stack(list(render(scene, np.random.default_rng(0)))[:20]).mean(-1)
    bright = frames > 180
    columns = (bright * (np.arange(64) + 0.5)).sum((1, 2)) / bright.sum((1, 2)) / 64
    assert np.diff(columns).mean() == pytest.approx(0.02, abs=0.002)
