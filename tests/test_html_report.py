"""The page as a file: its data, what it carries, and that nothing in a name becomes part of the page."""

import base64
import hashlib
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote_to_bytes

import av
import numpy as np
import pytest

from re2tal_jax.data.container import probe
from re2tal_jax.errors import DataError
from re2tal_jax.inference import html_report
from re2tal_jax.inference.html_report import write_html_report
from re2tal_jax.inference.report_media import choose_media, encode_preview
from tests.report_files import CLASSES, MARKUP, TRUTH, ground_truth, predictions, score, write_clip, write_report
from tests.video_files import numbered_frames, rotate, write_audio, write_video


class Page(HTMLParser):
    """The page as a browser takes it apart: scripts by id (or number), the title, the policy."""

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.scripts, self.texts, self.tags, self._open = {}, {}, [], []
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        self.data = json.loads(self.scripts["data"])

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "title", "style"):
            self._open.append((tag, dict(attrs).get("id") or f"{tag}"))

    def handle_data(self, data):
        if self._open:
            tag, name = self._open[-1]
            place = self.scripts if tag == "script" else self.texts
            place[name] = place.get(name, "") + data

    def handle_endtag(self, tag):
        if self._open and self._open[-1][0] == tag:
            self._open.pop()

    def video(self, video_id):
        return next(video for video in self.data["videos"] if video["id"] == video_id)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4")


def write(path, found, **options):
    defaults = {"videos": {}, "durations_sec": {}, "title": "t"}
    write_html_report(path, found, **(defaults | options))
    return Page(path)


def test_the_data_are_what_was_given(tmp_path, clip):
    page = Page(write_report(tmp_path / "report.html", {"first": clip}))
    assert page.data["classes"] == sorted(CLASSES)
    number = {name: i for i, name in enumerate(sorted(CLASSES))}
    first = page.video("first")
    assert first["truth"] == [0, 1, number[CLASSES[0]], 2, 4, number[CLASSES[1]], 5, 6, number[CLASSES[2]]]
    assert first["found"][:8] == [2.1, 4, number[CLASSES[1]], 0.9, 0, 1.1, number[CLASSES[0]], 0.8]
    assert [video["id"] for video in page.data["videos"]] == ["first", "second", "third"]
    assert page.video("third") == {
        "id": "third", "duration": 6, "found": [], "truth": [], "media": {"note": "There is no file of this video."}
    }  # fmt: skip


def test_the_evaluation_is_the_one_given(tmp_path):
    scored = score(ground_truth(), predictions())
    evaluation = Page(write_report(tmp_path / "report.html", {})).data["evaluation"]
    assert evaluation["average"] == scored.average
    np.testing.assert_allclose(evaluation["rows"]["mAP"], list(scored.per_tiou.values()), atol=1e-5)
    assert set(evaluation["rows"]) == {"mAP", "recall@1", "recall@5"}
    for row in evaluation["classes"]:
        np.testing.assert_allclose(row["ap"], scored.per_class[row["name"]], atol=1e-5)
        areas = [sum(precision) / 1000 / row["segments"] for precision in row["precision"]]
        np.testing.assert_allclose(areas, row["ap"], atol=1e-3)
    assert evaluation["errors"]["missed"] == [1, 1, 1]


def test_blocked_videos_are_not_shown_and_the_rest_of_the_subset_is(tmp_path):
    truth = ground_truth(TRUTH | {"unseen": [(0.0, 1.0, 0)]})
    truth["database"]["other"] = truth["database"]["first"] | {"subset": "training"}
    scored = html_report.DetectionMap(
        **{**vars(score(truth, predictions())), "blocked": frozenset({"second"})},
    )
    page = write(tmp_path / "report.html", predictions(), ground_truth=truth, scored=scored)
    assert [video["id"] for video in page.data["videos"]] == ["first", "third", "unseen"]


def test_names_are_data_and_never_markup(tmp_path):
    page = Page(write_report(tmp_path / "report.html", {}))
    assert "<img" not in page.source.replace(page.texts["style"], "")
    assert page.texts["title"] == page.data["title"] == f"Report {MARKUP}"
    tags = [tag for tag, _ in page.tags]
    assert (tags.count("script"), tags.count("img"), tags.count("html")) == (2, 0, 1)


def test_only_the_pages_own_script_and_style_may_run_and_nothing_is_loaded(tmp_path):
    page = Page(write_report(tmp_path / "report.html", {}))
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    for part, name in ((page.scripts["script"], "script-src"), (page.texts["style"], "style-src")):
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    addresses = re.findall(r"\w+://[^\"' )]+", page.source)
    assert set(addresses) == {"http://www.w3.org/2000/svg"}  # a name, not an address


def test_a_playable_file_is_carried_byte_by_byte(tmp_path, clip):
    page = Page(write_report(tmp_path / "report.html", {"first": clip}))
    media = page.video("first")["media"]
    assert media == {"carried": "media-0", "mime": "video/mp4"}
    assert base64.b64decode(page.scripts["media-0"]) == clip.read_bytes()


def test_chunks_join_to_the_whole_file(tmp_path, clip, monkeypatch):
    monkeypatch.setattr(html_report, "_CHUNK", 999)
    page = Page(write_report(tmp_path / "report.html", {"first": clip}))
    assert base64.b64decode(page.scripts["media-0"]) == clip.read_bytes()


def test_beyond_the_budget_files_are_linked_and_names_that_are_no_utf_8_work(tmp_path, clip):
    folder = tmp_path / "vid #1 %"
    folder.mkdir()
    name = os.fsdecode(b"caf\xe9?.mp4")
    (folder / name).write_bytes(clip.read_bytes())
    video_id = name.removesuffix(".mp4")
    (tmp_path / "out").mkdir()
    options = {"videos": {video_id: folder / name}, "embed_mib": 0}
    page = write(tmp_path / "out" / "report.html", {"results": {video_id: []}}, **options)
    video = page.video("caf\ufffd?")
    link = video["media"]["link"]
    assert link.startswith("../vid%20%231%20%25/")
    target = os.path.normpath(os.fsencode(tmp_path / "out") + b"/" + unquote_to_bytes(link))
    assert Path(os.fsdecode(target)).read_bytes() == clip.read_bytes()
    assert "media-0" not in page.scripts


def test_no_file_whatever_its_fault_stops_the_report(tmp_path, clip):
    faults = {
        "empty": b"",
        "text": b"no video at all",
        "cut": clip.read_bytes()[:200],
    }
    videos = {"missing": tmp_path / "nowhere.mp4", "folder": tmp_path}
    for name, content in faults.items():
        videos[name] = tmp_path / f"{name}.mp4"
        videos[name].write_bytes(content)
    videos["sound"] = write_audio(tmp_path / "sound.mp4")
    page = write(tmp_path / "report.html", {"results": {}}, videos=videos)
    notes = {video["id"]: video["media"]["note"] for video in page.data["videos"]}
    assert notes.keys() == videos.keys()
    assert all(note.startswith("The video cannot be shown: ") for note in notes.values())
    assert "No such file" in notes["missing"]
    assert "empty" in notes["empty"]
    assert "no video stream" in notes["sound"]
    assert str(tmp_path) not in page.source


def other_format(path, height=120, width=80):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for picture in numbered_frames(20, height, width):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_other_formats_are_carried_as_previews(tmp_path):
    path = other_format(tmp_path / "x.avi")
    page = write(tmp_path / "report.html", {"results": {}}, videos={"x": path})
    assert page.video("x")["media"] | {"note": ""} == {"carried": "media-0", "mime": "video/mp4", "note": ""}
    (tmp_path / "x.mp4").write_bytes(base64.b64decode(page.scripts["media-0"]))
    with av.open(str(tmp_path / "x.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
    content = (tmp_path / "x.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # the index comes first


def test_a_preview_is_small_upright_and_keeps_the_times_of_frames(tmp_path):
    times = [0, 100, 500, 600, 2000]
    tall = write_video(tmp_path / "tall.mp4", numbered_frames(5, 320, 480, step=40), times=times)
    assert encode_preview(rotate(tmp_path / "turned.mp4", 90, tall), tmp_path / "small.mp4", limit=1 << 20)
    info = probe(tmp_path / "small.mp4")
    assert (info.height, info.width) == (240, 160)
    with av.open(str(tmp_path / "small.mp4")) as container:
        seconds = [frame.time for frame in container.decode(video=0)]
    np.testing.assert_allclose(seconds, np.array(times) / 1000, atol=2e-3)


def test_a_preview_beyond_its_limit_is_given_up_and_removed(tmp_path, clip):
    assert not encode_preview(clip, tmp_path / "small.mp4", limit=100)
    assert not (tmp_path / "small.mp4").exists()


def test_files_too_large_become_previews_the_smallest_first(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (30, 96, 128, 3), np.uint8)
    large = write_video(tmp_path / "large.mp4", noise)
    small = write_clip(tmp_path / "small.mp4")
    assert large.stat().st_size > 3 * (24 << 10) + small.stat().st_size  # more than its preview is expected to take
    budget = small.stat().st_size + 6 * (24 << 10)
    media = choose_media({"large": large, "small": small}, page=tmp_path / "r.html", budget=budget, scratch=tmp_path)
    assert media["small"].carried == small
    preview = media["large"].carried
    assert preview is None or preview.stat().st_size < large.stat().st_size
    assert media["large"].note


def test_the_page_is_written_as_a_whole_or_not_at_all(tmp_path, clip, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(html_report, "_write", fail)
    with pytest.raises(KeyboardInterrupt):
        write_report(path, {"first": clip})
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("scores", "segments", "expected"),
    [
        ([0.9, 0.8, 0.7, 0.6, 0.5], 2, 0.6),  # two for each segment
        ([0.12398], 2, 0.123),  # rounded down, so that it is kept
        ([0.9, 0.8, 0.1], None, 0.3),
        ([0.09, 0.08, 0.07, 0.06], None, 0.07),  # three a video, where 0.3 would leave none
        ([], None, 0.3),
    ],
)
def test_the_slider_starts_where_it_keeps_something_sensible(tmp_path, scores, segments, expected):
    found = predictions({"v": [(0, 1, 0, score) for score in scores]})
    truth = None if segments is None else ground_truth({"v": [(i, i + 1, 0) for i in range(segments)]})
    page = write(tmp_path / "report.html", found, ground_truth=truth)
    assert page.data["threshold"]["value"] == expected


def test_without_ground_truth_there_are_no_verdicts_and_durations_come_from_what_is_known(tmp_path):
    found = predictions({"stated": [], "found": [(1.0, 7.5, 0, 0.5)], "nothing": []})
    page = write(tmp_path / "report.html", found, durations_sec={"stated": 9.5, "nothing": float("nan")})
    assert {video["id"]: video["duration"] for video in page.data["videos"]} == {
        "stated": 9.5,
        "found": 7.5,
        "nothing": 1,
    }
    assert [video["truth"] for video in page.data["videos"]] == [None] * 3
    assert not page.data["truth"]
    assert page.data["evaluation"] is None


def test_segments_that_the_evaluation_leaves_out_are_left_out(tmp_path):
    truth = ground_truth({"v": [(1, 2, 0), (1, 2, 0), (3, 3, 0), (5, 4, 0)]})
    page = write(tmp_path / "report.html", predictions({"v": []}), ground_truth=truth)
    assert page.video("v")["truth"] == [1, 2, 0]


def test_malformed_input_is_named(tmp_path):
    with pytest.raises(DataError, match="v: entry 0 lacks 'score'"):
        write(tmp_path / "report.html", {"results": {"v": [{"segment": [0, 1], "label": "a"}]}})
    with pytest.raises(ValueError, match="embed_mib = -1"):
        write(tmp_path / "report.html", {"results": {}}, embed_mib=-1)
    with pytest.raises(ValueError, match="ground_truth"):
        write(tmp_path / "report.html", predictions(), scored=score(ground_truth(), predictions()))
    assert not list(tmp_path.iterdir())


def test_a_detection_takes_at_most_32_letters(tmp_path):
    rng = np.random.default_rng(0)
    starts = rng.uniform(0, 100, 20_000).tolist()
    rows = [(start, start + 1 / 3, 0, float(s)) for start, s in zip(starts, rng.uniform(size=20_000), strict=True)]
    page = write(tmp_path / "report.html", predictions({"v": rows}))
    assert len(page.scripts["data"]) < 32 * len(rows)
