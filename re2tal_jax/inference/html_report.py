"""A report as one html file: every video with its timeline, and what the evaluation says; it opens without network.

The page is report_page/, filled with the data as json; videos lie in it as inert base64 text, made into something
playable only when one is opened. Names of classes and videos reach the page as data and are shown as text, never as
markup; a content security policy lets only the page's own script run.
"""

import base64
import hashlib
import html
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from decimal import ROUND_FLOOR, Context
from importlib import resources
from pathlib import Path
from string import Template
from typing import IO, Any

import numpy as np

from re2tal_jax.activitynet_format import Instances, columns, load
from re2tal_jax.evaluation import DetectionMap, keep_distinct, match_detections
from re2tal_jax.inference.diagnosis import KINDS, MISSED, ErrorBreakdown, break_down
from re2tal_jax.inference.report_media import Media, choose_media
from re2tal_jax.matching import Matching

SCRIPTS = tuple(
    f"{name}.js"
    for name in ("matching", "charts", "timeline", "evaluation", "state", "video", "list", "filters", "page")
)
TIOUS = (0.3, 0.4, 0.5, 0.6, 0.7)
"""What one can choose where no evaluation says more."""

UNSCORED_THRESHOLD = 0.3
_THREE_DIGITS = Context(prec=3, rounding=ROUND_FLOOR)  # downwards: what has the score itself is still kept
log = logging.getLogger(__name__)

_CHUNK = 3 << 18  # a multiple of 3: base64 of chunks then joins to base64 of the whole


def write_html_report(
    path: Path,
    predictions: Mapping[str, Any],
    *,
    videos: Mapping[str, Path],
    durations_sec: Mapping[str, float],
    title: str,
    ground_truth: Mapping[str, Any] | None = None,
    scored: DetectionMap | None = None,
    embed_mib: int = 64,
) -> None:
    """Write the report of predictions as one html file, as a whole or not at all.

    It shows the videos of `predictions` and `videos`, with `scored` also the rest of its subset. Files that browsers
    play are carried inside up to `embed_mib`, others and larger ones as small copies, the rest is linked. A video
    without file, or with one that cannot be read, has a timeline without player.

    Args:
        path: of the page; links are relative to its folder.
        predictions: ActivityNet form: {"results": {video id: [{"segment", "label", "score"}, …]}}, in seconds.
        videos: id to file.
        durations_sec: id to seconds; where one lacks, the ground truth's duration or the last end is taken.
        title: headline, plain text.
        ground_truth: ActivityNet form: {"database": {video id: {"duration", "subset", "annotations": […]}}}. Videos it
            does not have are shown without verdicts.
        scored: the evaluation of these predictions; brings tables, curves and the breakdown of errors.
        embed_mib: MiB of video that may be carried.

    Raises:
        DataError: malformed predictions or ground truth; video and entry are named.
        ValueError: `scored` without `ground_truth`, or a negative `embed_mib`.
    """
    if scored is not None and ground_truth is None:
        raise ValueError("scored was given without the ground_truth it belongs to.")
    if embed_mib < 0:
        raise ValueError(f"embed_mib = {embed_mib!r}: expected 0 or more.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = _shown(predictions, videos, ground_truth, scored)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with tempfile.TemporaryDirectory(prefix="report-") as scratch:
        files = {video_id: videos[video_id] for video_id in shown if video_id in videos}
        media = choose_media(files, page=path, budget=embed_mib << 20, scratch=Path(scratch))
        data = _data(predictions, shown, durations_sec, title, ground_truth, scored)
        for number, (video_id, entry) in enumerate(zip(shown, data["videos"], strict=True)):
            entry["media"] = _described(number, media.get(video_id, Media(note="There is no file of this video.")))
        try:
            with open(partial, "w", encoding="utf-8") as file:
                _write(file, data, [media.get(video_id, Media()).carried for video_id in shown])
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _shown(
    predictions: Mapping[str, Any],
    videos: Mapping[str, Path],
    ground_truth: Mapping[str, Any] | None,
    scored: DetectionMap | None,
) -> list[str]:
    """Return the ids of the page's videos, in order."""
    results, _ = load(predictions, "results")
    shown = results["results"].keys() | videos.keys()
    if ground_truth is not None and scored is not None:
        database, _ = load(ground_truth, "database")
        shown |= {name for name, video in database["database"].items() if video["subset"] == scored.subset}
        shown -= scored.blocked
    return sorted(shown)


def _data(
    predictions: Mapping[str, Any],
    shown: Sequence[str],
    durations_sec: Mapping[str, float],
    title: str,
    ground_truth: Mapping[str, Any] | None,
    scored: DetectionMap | None,
) -> dict[str, Any]:
    """Return what the page shows; of a video only names, numbers and flat lists of numbers."""
    found, name = load(predictions, "results")
    found = columns({video_id: found["results"].get(video_id, ()) for video_id in shown}, name, scored=True)
    database = {} if ground_truth is None else load(ground_truth, "database")[0]["database"]
    known = [video_id for video_id in shown if video_id in database]
    truth = columns({video_id: database[video_id]["annotations"] for video_id in known}, "ground truth", scored=False)
    distinct = keep_distinct(truth)
    classes = sorted({*found.labels, *(truth.labels[i] for i in np.flatnonzero(distinct))})
    number = {label: i for i, label in enumerate(classes)}
    detections = _flat(found, np.ones(len(found), bool), number)
    segments = dict(zip(known, _flat(truth, distinct, number), strict=True))
    durations = {video_id: database[video_id].get("duration") for video_id in known} | dict(durations_sec)
    thresholds = list(TIOUS if scored is None else scored.tiou_thresholds)
    assert found.scores is not None
    return {
        "title": _text(title),
        "classes": [_text(label) for label in classes],
        "tious": thresholds,
        "tiou": thresholds.index(0.5) if 0.5 in thresholds else 0,
        "threshold": _threshold(found.scores, len(shown), int(distinct.sum())),
        "truth": ground_truth is not None,
        "videos": [
            {
                "id": _text(video_id),
                "duration": _duration(durations.get(video_id), detections[i], segments.get(video_id, [])),
                "found": detections[i],
                "truth": segments.get(video_id),
            }
            for i, video_id in enumerate(shown)
        ],
        "evaluation": None
        if scored is None or ground_truth is None
        else _evaluation(ground_truth, predictions, scored),
    }


def _flat(instances: Instances, kept: np.ndarray, number: Mapping[str, int]) -> list[list[float]]:
    """Return, per video, start, end, class and (of detections) score of each instance in one list, best first."""
    label = np.array([number.get(label, -1) for label in instances.labels], np.int64)
    scores = instances.scores
    order = np.arange(len(instances)) if scores is None else np.lexsort((-scores, instances.video))
    order = order[kept[order]]
    ends = np.cumsum(np.bincount(instances.video[order], minlength=len(instances.video_ids)))
    lists = []
    for rows in np.split(order, ends[:-1]) if len(ends) else []:
        flat: list[float] = []
        for i in rows.tolist():
            start, end = instances.segments[i].tolist()
            flat += [_short(start), _short(end), int(label[i])]
            if scores is not None:
                flat.append(float(f"{scores[i]:.6g}"))
        lists.append(flat)
    return lists


def _short(seconds: float) -> float | int:
    """Return seconds to a tenth of a millisecond, in as few letters as json allows."""
    rounded = round(seconds, 4)
    return int(rounded) if rounded == int(rounded) else rounded


def _duration(stated: Any, found: Sequence[float], truth: Sequence[float] | None) -> float | int:
    try:
        seconds = float(stated)
    except (TypeError, ValueError):
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        seconds = max([*found[1::4], *(truth or [])[1::3], 0]) or 1.0
    return _short(seconds)


def _threshold(scores: np.ndarray, videos: int, segments: int) -> dict[str, Any]:
    """Return where the slider starts, and why there."""
    best = np.sort(scores)[::-1]
    if segments and len(best):
        value = best[min(2 * segments, len(best)) - 1]
        why = "keeps about twice as many detections as there are ground-truth segments"
    elif len(best) and (best >= UNSCORED_THRESHOLD).sum() < videos:
        value = best[min(3 * videos, len(best)) - 1]
        why = "keeps about three detections a video"
    else:
        value, why = UNSCORED_THRESHOLD, "leaves out what the model itself holds for unlikely"
    return {"value": float(_THREE_DIGITS.create_decimal(repr(float(value)))), "why": why}


def _evaluation(
    ground_truth: Mapping[str, Any], predictions: Mapping[str, Any], scored: DetectionMap
) -> dict[str, Any]:
    matching = match_detections(
        ground_truth,
        predictions,
        subset=scored.subset,
        tiou_thresholds=scored.tiou_thresholds,
        blocked=scored.blocked,
    )
    recalls = {
        f"recall@{k}": [_share(scored.recall[tiou, k]) for tiou in scored.tiou_thresholds]
        for k in sorted({k for _, k in scored.recall})
    }
    return {
        "subset": _text(scored.subset),
        "average": scored.average,
        "rows": {"mAP": [_share(value) for value in scored.per_tiou.values()]} | recalls,
        "findings": dict(scored.findings),
        "classes": _per_class(matching, scored),
        "errors": _errors(break_down(matching)),
    }


def _per_class(matching: Matching, scored: DetectionMap) -> list[dict[str, Any]]:
    """Return each class: precision (in thousandths) after each right detection makes its curve, as recall is known."""
    curves = matching.precision_recall()
    return [
        {
            "name": _text(name),
            "segments": int((matching.truth.label == i).sum()),
            "detections": int((matching.found.label == i).sum()),
            "ap": [_share(value) for value in scored.per_class[name]],
            "precision": [np.rint(1000 * precision).astype(int).tolist() for _, precision in curves[name]],
        }
        for i, name in enumerate(matching.truth.classes)
    ]


def _errors(errors: ErrorBreakdown) -> dict[str, Any]:
    return {
        "kinds": list(KINDS),
        "shares": [[_share(value) for value in group] for group in errors.shares],
        "gains": {name: _share(gain) for name, gain in errors.gains.items()},
        "missed": errors.missed.tolist(),
        "segments": errors.num_ground_truth,
        "missed_name": MISSED,
    }


def _share(value: float) -> float:
    return round(float(value), 5)


def _text(name: str) -> str:
    """Return a name as it can be shown: what stands for bytes that are no UTF-8 becomes replacement characters."""
    return name.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _described(number: int, media: Media) -> dict[str, Any]:
    """Return a video's player for the page; a carried one is found by its number."""
    described: dict[str, Any] = {"note": _text(media.note)} if media.note else {}
    if media.carried is not None:
        described |= {"carried": f"media-{number}", "mime": media.mime}
    elif media.link is not None:
        described |= {"link": media.link}
    return described


def _write(file: IO[str], data: Mapping[str, Any], carried: Sequence[Path | None]) -> None:
    """Write the page; carried files are copied in chunk by chunk."""
    folder = resources.files("re2tal_jax.inference") / "report_page"
    style = (folder / "page.css").read_text("utf-8")
    script = "\n".join((folder / name).read_text("utf-8") for name in SCRIPTS)
    before, marker, after = (folder / "page.html").read_text("utf-8").partition("$videos")
    assert marker
    body = Template(before.partition("<script>")[2].partition("</script>")[0]).substitute(script=script)
    file.write(
        Template(before).substitute(
            policy=_policy(style, body),
            title=html.escape(data["title"]),
            style=style,
            # No "<" in the text: neither </script> nor <!-- can end or hide it, whatever the names are.
            data=json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
            script=script,
        )
    )
    for number, source in enumerate(carried):
        if source is not None:
            file.write(f'<script type="text/plain" id="media-{number}">')
            try:
                with open(source, "rb") as content:
                    while chunk := content.read(_CHUNK):
                        file.write(base64.b64encode(chunk).decode("ascii"))
            except OSError as error:  # gone since it was looked at: the page is worth more than one picture
                log.warning("%s: cannot be read any more (%s); the report is without it.", source, error.strerror)
            file.write("</script>\n")
    file.write(after)


def _policy(style: str, script: str) -> str:
    """Return the content security policy: this style, this script, media, and nothing else."""
    sources = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "media-src": "'self' blob: file:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in sources.items())


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
