import csv
import json

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from re2tal_jax.errors import DataError
from re2tal_jax.evaluation import detection_map, match_detections
from re2tal_jax.segments import tiou
from tests.parity import map as parity

TRUTH = {"v_1": [((0, 10), "dive"), ((20, 30), "dive")], "v_2": [((0, 10), "jump")]}


def database(videos, subset="validation"):
    return {
        "database": {
            video_id: {"subset": subset, "annotations": [{"segment": list(s), "label": label} for s, label in rows]}
            for video_id, rows in videos.items()
        }
    }


def results(videos):
    return {
        "results": {
            video_id: [{"segment": list(s), "label": label, "score": score} for s, label, score in rows]
            for video_id, rows in videos.items()
        }
    }


def evaluate(truth, found, thresholds=(0.5,), **options):
    return detection_map(database(truth), results(found), subset="validation", tiou_thresholds=thresholds, **options)


def perfect(truth):
    """Every segment once, all scores different."""
    rows = [(video_id, s, label) for video_id, videos in truth.items() for s, label in videos]
    found = {video_id: [] for video_id in truth}
    for i, (video_id, s, label) in enumerate(rows):
        found[video_id].append((s, label, (i + 1) / (len(rows) + 1)))
    return found


def test_precision_of_hand_checked_detections():
    # dive: right, wrong, right -> (1/1 + 2/3) / 2; jump: nothing found
    found = {"v_1": [((0, 10), "dive", 0.9), ((50, 60), "dive", 0.8), ((20, 29), "dive", 0.7)]}
    result = evaluate(TRUTH, found, (0.5, 0.95))
    np.testing.assert_allclose(result.per_class["dive"], [(1 + 2 / 3) / 2, 1 / 2])
    np.testing.assert_allclose(result.per_class["jump"], [0, 0])
    assert result.per_tiou == pytest.approx({0.5: 5 / 12, 0.95: 1 / 4})
    assert result.average == pytest.approx(1 / 3)


def test_precision_is_interpolated():
    # wrong, right, right: precision 0, 1/2, 2/3; the first right one counts with the 2/3 reached later
    found = {"v_1": [((50, 60), "dive", 0.9), ((0, 10), "dive", 0.8), ((20, 30), "dive", 0.7)]}
    np.testing.assert_allclose(evaluate(TRUTH, found).per_class["dive"], 2 / 3)


def test_a_second_detection_of_a_segment_is_wrong():
    found = {"v_1": [((0, 10), "dive", 0.9), ((0, 10), "dive", 0.8), ((20, 30), "dive", 0.7)]}
    np.testing.assert_allclose(evaluate(TRUTH, found).per_class["dive"], (1 + 2 / 3) / 2)


def test_a_detection_falls_back_to_the_next_best_segment():
    truth = {"v_1": [((0, 10), "dive"), ((2, 12), "dive")]}
    found = {"v_1": [((0, 10), "dive", 0.9), ((0, 11), "dive", 0.8)]}  # both prefer the first segment
    np.testing.assert_allclose(evaluate(truth, found, (0.5, 0.8)).per_class["dive"], [1, 1 / 2])


def test_detections_in_the_wrong_video_or_class_are_wrong():
    result = evaluate(TRUTH, {"v_2": [((0, 10), "dive", 0.9)], "v_1": [((0, 10), "jump", 0.9)]})
    assert result.average == 0


def test_recall_counts_the_best_k_detections_per_segment():
    # v_1 has two dives: recall@1 looks at two detections, recall@2 at four
    found = {"v_1": [((0, 10), "dive", 0.9), ((1, 10), "dive", 0.8), ((50, 60), "dive", 0.7), ((20, 30), "dive", 0.6)]}
    result = evaluate(TRUTH, found, recall_at=(1, 2))
    assert result.recall == pytest.approx({(0.5, 1): (1 / 2 + 0) / 2, (0.5, 2): (1 + 0) / 2})
    assert result.metrics() == pytest.approx(
        {"average_mAP": result.average, "mAP@0.5": result.average, "recall@0.5@1": 0.25, "recall@0.5@2": 0.5}
    )


def test_zero_length_reversed_and_duplicate_ground_truth_is_left_out_and_counted():
    broken = [((5, 5), "jump"), ((9, 2), "jump"), ((0, 10.0005), "jump"), ((0, 10), "dive")]
    truth = {"v_1": [((0, 10), "jump"), *broken]}
    result = evaluate(truth, perfect({"v_1": truth["v_1"][:1] + truth["v_1"][-1:]}))
    assert result.average == 1
    assert result.num_ground_truth == 2
    assert result.findings == {
        "zero-length or reversed ground-truth segments left out": 2,
        "duplicate ground-truth segments left out": 1,
    }


def test_a_duplicate_is_measured_against_segments_that_were_kept():
    """The third is within a millisecond of the second, which is left out, but not of the first."""
    truth = {"v_1": [((0, 10), "dive"), ((0, 10.0008), "dive"), ((0, 10.0016), "dive")]}
    assert evaluate(truth, {}).num_ground_truth == 2


def test_what_cannot_be_right_is_counted():
    found = perfect(TRUTH)
    found["v_1"] += [((0, 10), "swim", 0.99), ((9, 1), "dive", 0.001)]
    found["v_9"] = [((0, 10), "dive", 0.0001)]
    truth = database(TRUTH)
    truth["database"]["v_3"] = {"subset": "training", "annotations": []}
    found["v_3"] = [((0, 10), "dive", 0.0001)]
    result = detection_map(truth, results(found), subset="validation", tiou_thresholds=(0.5,), blocked=["v_8"])
    assert result.average == 1  # they come last
    assert result.num_predictions == 7
    assert result.findings == {
        "blocked videos that the ground truth does not have": 1,
        "detections of labels without ground truth in the subset, ignored": 1,
        "detections on videos unknown to the ground truth, counted as wrong": 1,
        "detections on videos of other subsets, counted as wrong": 1,
        "reversed detections, counted as wrong": 1,
    }


def test_detections_on_unknown_videos_lower_precision():
    found = perfect(TRUTH) | {"v_9": [((0, 10), "jump", 1.0)]}
    np.testing.assert_allclose(evaluate(TRUTH, found).per_class["jump"], 1 / 2)


def test_blocked_videos_are_left_out_on_both_sides(tmp_path):
    found = perfect(TRUTH) | {"v_2": [((40, 50), "dive", 1.0)]}
    path = tmp_path / "blocked.json"
    path.write_text('["v_2"]')
    for blocked in (["v_2"], path):
        result = evaluate(TRUTH, found, blocked=blocked)
        assert result.average == 1
        assert list(result.per_class) == ["dive"]
    for other in ('"v_2"', "[1, 2]", "3"):
        path.write_text(other)
        with pytest.raises(DataError, match=r"blocked\.json: expected a list of video ids"):
            evaluate(TRUTH, found, blocked=path)


def test_no_detections_at_all_are_no_precision_and_no_recall():
    result = evaluate(TRUTH, {})
    assert result.average == 0
    assert set(result.recall.values()) == {0.0}


@st.composite
def problems(draw, quantised=True):
    """Random ground truth and detections near it; on a coarse time grid many overlaps are equal."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    step = 5 if quantised else 1e-3
    truth, found = {}, {}
    for i in range(draw(st.integers(1, 4))):
        starts = np.round(rng.uniform(0, 60, (rng.integers(1, 7), 1)) / step) * step
        segments = np.concatenate([starts, starts + step * np.round(rng.uniform(1, 30, starts.shape) / step + 1)], 1)
        truth[f"v_{i}"] = [(tuple(s), rng.choice(["dive", "jump"])) for s in segments.tolist()]
        near = segments[rng.integers(0, len(segments), 12)]
        near = np.sort(near + np.round(rng.normal(0, 5, near.shape) / step) * step, axis=1)
        found[f"v_{i}"] = [
            (tuple(s), rng.choice(["dive", "jump"]), p)
            for s, p in zip(near.tolist(), rng.uniform(0, 1, len(near)).tolist(), strict=True)
        ]
    return truth, found


def one_by_one(truth, found, label, threshold):
    """The definition, detection by detection: average precision of one class."""
    segments = {v: np.array([s for s, name in rows if name == label]).reshape(-1, 2) for v, rows in truth.items()}
    for v, rows in segments.items():
        segments[v] = np.array(list(dict.fromkeys(map(tuple, rows.tolist())))).reshape(-1, 2)  # without duplicates
    free = {v: np.ones(len(s), bool) for v, s in segments.items()}
    ranked = sorted(((p, v, s) for v, rows in found.items() for s, name, p in rows if name == label), reverse=True)
    right = []
    for _, v, s in ranked:
        overlap = np.where(free[v], tiou(np.array([s]), segments[v])[0], -1)
        best = len(overlap) - 1 - overlap[::-1].argmax() if len(overlap) else None
        hit = best is not None and overlap[best] >= threshold
        right.append(hit)
        if hit:
            free[v][best] = False
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    return sum(precision[i:].max() for i in np.flatnonzero(right)) / sum(map(len, segments.values()))


@settings(deadline=None)
@given(problems(), st.sampled_from([0.3, 0.5, 0.75]))
def test_matching_all_at_once_equals_the_definition_one_by_one(problem, threshold):
    truth, found = problem
    result = evaluate(truth, found, (0.25, threshold))
    for label, precision in result.per_class.items():
        np.testing.assert_allclose(precision[1], one_by_one(truth, found, label, threshold), rtol=1e-12)


@settings(deadline=None)
@given(problems(quantised=False))
def test_perfect_detections_have_precision_and_recall_one(problem):
    truth, _ = problem
    result = evaluate(truth, perfect(truth), (0.5, 0.95, 1.0))
    assert result.average == 1
    assert result.per_tiou == {0.5: 1, 0.95: 1, 1.0: 1}
    assert set(result.recall.values()) == {1.0}


@settings(deadline=None)
@given(problems(), st.integers(0, 10**6))
def test_names_and_order_of_videos_and_detections_are_irrelevant(problem, seed):
    truth, found = problem
    rng = np.random.default_rng(seed)
    names = {v: f"renamed {i}" for i, v in enumerate(rng.permutation(list(truth)).tolist())}
    shuffled = {names[v]: [found[v][i] for i in rng.permutation(len(found[v]))] for v in rng.permutation(list(found))}
    renamed = {names[v]: rows for v, rows in truth.items()}
    a, b = evaluate(truth, found, (0.3, 0.7)), evaluate(renamed, shuffled, (0.3, 0.7))
    assert a.metrics() == pytest.approx(b.metrics(), abs=1e-12)


@settings(deadline=None)
@given(problems(), st.integers(0, 10**6))
def test_removing_detections_never_raises_full_recall(problem, seed):
    truth, found = problem
    keep = np.random.default_rng(seed)
    fewer = {v: [row for row in rows if keep.uniform() < 0.7] for v, rows in found.items()}
    before, after = (evaluate(truth, f, (0.3, 0.7), recall_at=(1000,)).recall for f in (found, fewer))
    assert all(after[key] <= before[key] + 1e-12 for key in before)


def test_thresholds_are_keys_as_one_writes_them():
    result = evaluate(TRUTH, perfect(TRUTH), np.linspace(0.3, 0.7, 5))
    assert list(result.per_tiou) == [0.3, 0.4, 0.5, 0.6, 0.7]
    assert list(result.metrics())[:3] == ["average_mAP", "mAP@0.3", "mAP@0.4"]


@pytest.mark.parametrize("thresholds", [(), (0.0,), (1.5,), (0.5, 0.5), (float("nan"),)])
def test_thresholds_out_of_range_are_refused(thresholds):
    with pytest.raises(ValueError, match="tiou_thresholds = "):
        evaluate(TRUTH, {}, thresholds)


def test_recall_needs_at_least_one_detection():
    with pytest.raises(ValueError, match=r"recall_at = \(0,\)"):
        evaluate(TRUTH, {}, recall_at=(0,))


def test_the_result_prints_as_the_table_of_papers():
    found = perfect(TRUTH) | {"v_9": [((0, 10), "swim", 0.5)]}
    assert str(evaluate(TRUTH, found, (0.5, 0.75))).splitlines() == [
        "validation: 3 ground-truth segments of 2 classes, 4 detections",
        "tIoU            0.50    0.75 average",
        "mAP (%)       100.00  100.00  100.00",
        "recall@1 (%)  100.00  100.00  100.00",
        "recall@5 (%)  100.00  100.00  100.00",
        "1 detections of labels without ground truth in the subset, ignored",
    ]


def test_an_unknown_subset_names_those_present():
    with pytest.raises(DataError, match=r"no video is of subset 'val'\. Present: 'validation' \(2 videos\)\."):
        detection_map(database(TRUTH), results({}), subset="val", tiou_thresholds=(0.5,))
    with pytest.raises(DataError, match="Present: no videos at all"):
        detection_map(database({}), results({}), subset="val", tiou_thresholds=(0.5,))


@pytest.mark.parametrize(
    ("truth", "blocked"), [({"v_1": []}, ()), ({"v_1": [((5, 5), "dive")]}, ()), (TRUTH, ("v_1", "v_2"))]
)
def test_an_evaluation_without_ground_truth_is_an_error(truth, blocked):
    with pytest.raises(DataError, match="subset 'validation' has no ground-truth segment to evaluate"):
        evaluate(truth, {}, blocked=blocked)


def test_malformed_entries_are_named_by_file_and_video(tmp_path):
    truth, found = tmp_path / "truth.json", tmp_path / "found.json"
    truth.write_text(json.dumps(database(TRUTH)))
    found.write_text(json.dumps(results({"v_1": [((0, float("nan")), "dive", 0.5)]})))
    with pytest.raises(DataError, match=r"found\.json: v_1: entry 0 has end nan; expected a finite number"):
        detection_map(truth, found, subset="validation", tiou_thresholds=(0.5,))
    truth.write_text(json.dumps(database({"v_7": [((0, 10, 20), "dive")]})))
    with pytest.raises(DataError, match=r"truth\.json: v_7: entry 0 has segment \[0, 10, 20\]"):
        detection_map(truth, found, subset="validation", tiou_thresholds=(0.5,))
    truth.write_text(json.dumps({"database": {"v_7": {"annotations": []}}}))
    with pytest.raises(DataError, match=r"truth\.json: v_7: expected 'subset' and 'annotations'"):
        detection_map(truth, found, subset="validation", tiou_thresholds=(0.5,))
    truth.write_text(json.dumps(results({})))
    with pytest.raises(DataError, match=r"truth\.json: expected ActivityNet form, \{'database'"):
        detection_map(truth, found, subset="validation", tiou_thresholds=(0.5,))
    with pytest.raises(DataError, match=r"nowhere\.json: cannot be read"):
        detection_map(tmp_path / "nowhere.json", found, subset="validation", tiou_thresholds=(0.5,))


def test_published_results_are_reproduced(parity_dir):
    path = parity_dir / "map"
    assert parity.recognises(path, None)
    rows = list(parity.replay(path, None))
    assert len(rows) > 70
    assert [row for row in rows if not row.passed] == []


def test_the_activitynet_sample_finds_every_segment_but_the_zero_length_ones(data_dir):
    """Its detections are the ground truth; the official script even counts the three zero-length segments as found."""
    annotations = json.loads((data_dir / "anet_annos" / "anet_anno_action.json").read_text())
    with open(data_dir / "anet_annos" / "video_info_new.csv", newline="") as file:
        subsets = {row["video"]: row["subset"] for row in csv.DictReader(file)}
    truth = {v: {"subset": subsets[v], "annotations": a["annotations"]} for v, a in annotations.items()}
    sample = json.loads((data_dir / "anet_sample" / "sample_detection_prediction.json").read_text())
    found = {f"v_{video_id}": entries for video_id, entries in sample["results"].items()}
    result = detection_map(
        {"database": truth}, {"results": found}, subset="validation", tiou_thresholds=(0.5, 0.75, 0.95)
    )
    assert result.num_ground_truth == 7293 - 3 - 19
    assert len(result.per_class) == 200
    assert result.findings["zero-length or reversed ground-truth segments left out"] == 3
    assert {result.recall[tiou, 5] for tiou in (0.5, 0.75, 0.95)} == {1.0}


@pytest.mark.parametrize(
    ("file", "subset", "count"), [("actionformer_thumos14.json", "Test", 3358), ("thumos_gt.json", "test", 3311)]
)
def test_thumos_ground_truth_finds_itself(data_dir, file, subset, count):
    path = data_dir / "thumos_gt" / file
    videos = json.loads(path.read_text())["database"]
    found = {
        v: [{"segment": a["segment"], "label": a["label"], "score": 1.0} for a in video["annotations"]]
        for v, video in videos.items()
        if video["subset"] == subset
    }
    result = detection_map(path, {"results": found}, subset=subset, tiou_thresholds=(0.3, 0.5, 0.7))
    assert (result.average, result.num_ground_truth) == (1.0, count)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_area_under_the_curve_is_the_average_precision(seed):
    rng = np.random.default_rng(seed)
    truth = {f"v{v}": [((s, s + 5), f"c{rng.integers(2)}") for s in rng.uniform(0, 60, 4)] for v in range(3)}
    found = {v: [((s, s + 5), f"c{rng.integers(2)}", rng.uniform()) for s in rng.uniform(0, 60, 9)] for v in truth}
    options = {"subset": "validation", "tiou_thresholds": (0.1, 0.4)}
    curves = match_detections(database(truth), results(found), **options).precision_recall()
    expected = evaluate(truth, found, (0.1, 0.4)).per_class
    for name, (low, high) in curves.items():
        areas = [np.sum(np.diff(recall, prepend=0) * precision) for recall, precision in (low, high)]
        np.testing.assert_allclose(areas, expected[name], atol=1e-12)


def test_matching_tells_which_detection_found_which_segment():
    found = {"v_1": [((0, 9), "dive", 0.5), ((0, 10), "dive", 0.9)], "v_2": [((5, 10), "jump", 0.7)]}
    matching = match_detections(database(TRUTH), results(found), subset="validation", tiou_thresholds=(0.5, 0.6))
    assert matching.found.scores.tolist() == [0.9, 0.5, 0.7]
    assert matching.truth.segments.tolist() == [[0, 10], [20, 30], [0, 10]]
    assert matching.finder.tolist() == [[0, 3, 2], [0, 3, 3]]  # 3: none
    assert matching.correct.tolist() == [[True, False, True], [True, False, False]]
