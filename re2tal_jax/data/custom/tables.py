"""Annotations as people make them, brought to ActivityNet's form: tables, ELAN, VIA-3, ActivityNet's own JSON.

    CSV    video,start_sec,end_sec,label[,subset][,duration_sec]; also separated by ; (decimal commas then) or tabs
    .eaf   ELAN: each time-aligned annotation of each tier is a segment, its text the label, or else the tier's name
    JSON   a VIA-3 project: each temporal segment with each of its attributes; or ActivityNet form

What comes out is {name: {"annotations": [{"label", "segment"}], …}}, names as the file writes them, with "subset",
"duration", "frame" and "fps" where it tells them. `read_listing` reads one file or a folder of them.
"""

import csv
import difflib
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree.ElementTree import Element, ParseError

import defusedxml
from defusedxml import ElementTree

from re2tal_jax.data.annotations import load_json
from re2tal_jax.data.video_folder import printable, without_suffix
from re2tal_jax.errors import DataError, did_you_mean

Listing = dict[str, dict[str, Any]]
"""Videos by name, in ActivityNet form; `subset` and `duration` may be missing."""

COLUMNS = ("video", "start_sec", "end_sec", "label")
OPTIONAL_COLUMNS = ("subset", "duration_sec")
_CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d+(?:\.\d*)?)")
_TEMPORAL_SEGMENT = "FILE1_Z2_XY0"  # VIA: one file, two times, no place in the picture
_CHECKBOX, _VIDEO = 2, 4  # VIA's numbers of a type of attribute and of a type of file
_MADE_ONCE = ("subset", "duration", "frame", "fps")


def read_listing(path: str | Path, *, tiers: Iterable[str] | None = None) -> Listing:
    """Read an annotation file, or every .csv, .tsv, .eaf and .json file directly in a folder.

    Args:
        path: file or folder.
        tiers: the ELAN tiers or VIA attributes to take; None takes all.

    Raises:
        DataError: nothing there, a file that is not of its form (with line, or the place in it), a tier that no file
            has, or a video that gets two subsets or durations.
    """
    path = Path(path)
    wanted = None if tiers is None else frozenset(tiers)
    files = _files(path)
    listing: Listing = {}
    known: set[str] = set()
    for file in files:
        for name, video in _READERS[file.suffix.lower()](file, wanted, known):
            add_video(listing, name, video, where=f"{file}: video '{printable(name)}'")
    unknown = sorted((wanted or frozenset()) - known)
    if unknown:
        raise DataError(
            f"{path}: no tier or attribute {unknown[0]!r} (option tiers). {did_you_mean(unknown[0], known)}"
        )
    return listing


def add_video(listing: Listing, name: str, video: Mapping[str, Any], *, where: str) -> None:
    """Add a video, or more segments of one that is there.

    Raises:
        DataError: the two disagree about subset, duration, frames or fps.
    """
    before = listing.setdefault(name, {**video, "annotations": []})
    for field in _MADE_ONCE:
        if field in video and video[field] != before.setdefault(field, video[field]):
            raise DataError(f"{where} has the {field} {before[field]!r} and {video[field]!r}; give it one.")
    added = video["annotations"]
    if isinstance(added, list) and isinstance(before["annotations"], list):
        before["annotations"] = [*before["annotations"], *added]
    else:
        before["annotations"] = added  # what is wrong with it is told when it is parsed


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in _READERS and file.name[0] != ".")
        if not files:
            raise DataError(f"Folder {path} holds no annotation file ({', '.join(_READERS)}).")
        return files
    if not path.is_file():
        raise DataError(f"Annotation file {path} does not exist; docs/your_data.md says what it may be.")
    if path.suffix.lower() not in _READERS:
        raise DataError(f"{path}: annotations are read from {', '.join(_READERS)}, by the extension of the file.")
    return [path]


Videos = Iterator[tuple[str, dict[str, Any]]]


def _segment(start: float, end: float, label: str) -> dict[str, Any]:
    return {"segment": [start, end], "label": label}


# --- tables ----------------------------------------------------------------------------------------------------------


def _read_table(path: Path, tiers: frozenset[str] | None, known: set[str]) -> Videos:
    """Yield each row of a table; one without start, end and label lists a video in which nothing happens."""
    del tiers, known
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}: UTF-16 text; save it as UTF-8.")
    # A name may be bytes that are no UTF-8; escaped like this it equals that of the file.
    text = io.StringIO(content.decode("utf-8-sig", "surrogateescape"), newline="")
    delimiter = max(",;\t", key=text.readline().count)
    text.seek(0)
    rows = csv.DictReader(text, delimiter=delimiter, skipinitialspace=True)
    rows.fieldnames = [name.strip().lower() for name in rows.fieldnames or ()]
    _check_columns(path, list(rows.fieldnames))
    try:
        for row in rows:
            cells = {name: (text or "").strip() for name, text in row.items() if isinstance(name, str)}
            if any(cells.values()):
                yield _row(f"{path}: line {rows.line_num}", cells, decimal_comma=delimiter == ";")
    except csv.Error as error:
        raise DataError(f"{path}: line {rows.line_num}: {error}.") from error


def _check_columns(path: Path, found: list[str]) -> None:
    missing = [name for name in COLUMNS if name not in found]
    if missing:
        raise DataError(
            f"{path}: no column {missing[0]!r}; the first line has {', '.join(map(repr, found)) or 'nothing'}. Needed: "
            f"{', '.join(COLUMNS)}; optional: {', '.join(OPTIONAL_COLUMNS)}."
        )
    for name in found:
        meant = difflib.get_close_matches(name, OPTIONAL_COLUMNS, n=1, cutoff=0.7)
        if meant and name not in OPTIONAL_COLUMNS and meant[0] not in found:
            raise DataError(f"{path}: column {name!r}: did you mean {meant[0]!r}? Rename it, or leave it out.")


def _row(where: str, cells: Mapping[str, str], *, decimal_comma: bool) -> tuple[str, dict[str, Any]]:
    name, label = cells["video"], cells["label"]
    if not name:
        raise DataError(f"{where}: no video is named.")
    where = f"{where}: video '{printable(name)}'"
    if printable(label) != label:
        raise DataError(f"{where}: the label '{printable(label)}' is not UTF-8 text; save the file as UTF-8.")
    seconds = {
        field: _seconds(f"{where}: {field}", cells[field], decimal_comma)
        for field in ("start_sec", "end_sec", "duration_sec")
        if cells.get(field)
    }
    there = ["start_sec" in seconds, "end_sec" in seconds, bool(label)]
    if any(there) and not all(there):
        raise DataError(
            f"{where}: start_sec, end_sec and label belong together: fill in all, or none for a video alone."
        )
    video: dict[str, Any] = {"annotations": []}
    if all(there):
        video["annotations"] = [_segment(seconds["start_sec"], seconds["end_sec"], label)]
    if cells.get("subset"):
        video["subset"] = cells["subset"]
    if "duration_sec" in seconds:
        video["duration"] = seconds["duration_sec"]
    return name, video


def _seconds(where: str, text: str, decimal_comma: bool) -> float:
    text = text.replace(",", ".") if decimal_comma else text
    clock = _CLOCK.fullmatch(text)
    if clock:
        hours, minutes, seconds = clock[1], int(clock[2]), float(clock[3])
        if seconds >= 60 or (hours and minutes >= 60):
            what = "seconds" if seconds >= 60 else "minutes"
            raise DataError(
                f"{where} = {text!r}: {what} end at 59 in h:mm:ss. Correct it, or write seconds alone (83.5)."
            )
        return int(hours or 0) * 3600 + minutes * 60 + seconds
    try:
        return float(text)
    except ValueError:
        raise DataError(f"{where} = {text!r} is no time; write seconds (83.5) or h:mm:ss (0:01:23.5).") from None


# --- ELAN ------------------------------------------------------------------------------------------------------------


def _read_elan(path: Path, tiers: frozenset[str] | None, known: set[str]) -> Videos:
    """Yield the one video of an ELAN file. Annotations that refer to others have no times of their own."""
    try:
        root = ElementTree.parse(path, forbid_dtd=True).getroot()
    except ParseError as error:
        raise DataError(f"{path}: not valid XML: {error}; can ELAN open it?") from error
    except defusedxml.DefusedXmlException as error:
        raise DataError(f"{path}: the file declares a document type or entities, which ELAN never does.") from error
    if root is None or root.tag != "ANNOTATION_DOCUMENT":
        raise DataError(f"{path}: not an ELAN file (its root is {'nothing' if root is None else root.tag!r}).")
    name, origin_ms = _media(path, root)
    times = {slot.get("TIME_SLOT_ID"): slot.get("TIME_VALUE") for slot in root.iter("TIME_SLOT")}
    annotations = []
    for tier in root.iter("TIER"):
        tier_name = tier.get("TIER_ID", "")
        known.add(tier_name)
        if tiers is not None and tier_name not in tiers:
            continue
        for item in tier.iter("ALIGNABLE_ANNOTATION"):
            slots = [times.get(item.get(key)) for key in ("TIME_SLOT_REF1", "TIME_SLOT_REF2")]
            where = f"{path}: tier {tier_name!r}: annotation {item.get('ANNOTATION_ID')!r}"
            start, end = (_elan_seconds(where, slot, origin_ms) for slot in slots)
            label = (item.findtext("ANNOTATION_VALUE") or "").strip() or tier_name
            annotations.append(_segment(start, end, label))
    yield name, {"annotations": annotations}


def _elan_seconds(where: str, value: str | None, origin_ms: int) -> float:
    if value is None:
        raise DataError(f"{where} is not aligned in time: align it in ELAN, or leave its tier out (option tiers).")
    try:
        return (int(value) + origin_ms) / 1000
    except ValueError:
        raise DataError(f"{where} has the time {value!r}; whole milliseconds are expected.") from None


def _media(path: Path, root: Element) -> tuple[str, int]:
    """Return the name of the first video that the file links, or its own, and where in the video its time starts."""
    for media in root.iter("MEDIA_DESCRIPTOR"):
        for key in ("RELATIVE_MEDIA_URL", "MEDIA_URL"):
            url = unquote(media.get(key, ""), errors="surrogateescape").removeprefix("file://")
            if without_suffix(url) != url:
                origin = media.get("TIME_ORIGIN", "0")
                if not re.fullmatch(r"-?\d+", origin):
                    raise DataError(f"{path}: TIME_ORIGIN = {origin!r}; whole milliseconds are expected.")
                return url, int(origin)
    return path.stem, 0


# --- JSON ------------------------------------------------------------------------------------------------------------


def _read_json(path: Path, tiers: frozenset[str] | None, known: set[str]) -> Videos:
    content = load_json(path)
    if isinstance(content, dict) and isinstance(content.get("database"), dict):
        for name, video in content["database"].items():
            if not isinstance(video, dict) or "annotations" not in video:
                raise DataError(f"{path}: video '{printable(name)}': no \"annotations\"; a list is needed.")
            yield name, {key: value for key, value in video.items() if key in (*_MADE_ONCE, "annotations")}
    elif isinstance(content, dict) and {"metadata", "file", "view", "attribute"} <= content.keys():
        try:
            yield from _via(path, content, tiers, known)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise DataError(f"{path}: not a whole VIA-3 project ({type(error).__name__}: {error}).") from error
    else:
        raise DataError(
            f'{path}: neither ActivityNet form (no "database" at the top) nor a VIA-3 project (it has "metadata", '
            '"file", "view" and "attribute").'
        )


def _via(path: Path, project: Mapping[str, Any], tiers: frozenset[str] | None, known: set[str]) -> Videos:
    """Yield every video of a VIA-3 project, then every segment with every attribute that it has."""
    attributes = {
        key: attribute for key, attribute in project["attribute"].items() if attribute["anchor_id"] == _TEMPORAL_SEGMENT
    }
    known.update(attribute["aname"] for attribute in attributes.values())
    names: dict[str, str] = {}
    for view, content in project["view"].items():
        file = project["file"][str(content["fid_list"][0])]
        if file["type"] == _VIDEO:
            names[view] = file["fname"] or unquote(file["src"], errors="surrogateescape")
            yield names[view], {"annotations": []}
    for key, item in project["metadata"].items():
        if item["vid"] not in names or len(item["z"]) != 2:
            continue
        name, (start, end) = names[item["vid"]], map(float, item["z"])
        chosen = [
            label
            for number, text in item["av"].items()
            if number in attributes and (tiers is None or attributes[number]["aname"] in tiers)
            for label in _via_labels(attributes[number], str(text))
        ]
        if not chosen and tiers is None:
            raise DataError(f"{path}: video '{printable(name)}': segment {key!r} has no label.")
        yield name, {"annotations": [_segment(start, end, label) for label in chosen]}


def _via_labels(attribute: Mapping[str, Any], text: str) -> list[str]:
    """Return the names of the options chosen, or what was written where the attribute has none."""
    options = attribute["options"]
    chosen = text.split(",") if attribute["type"] == _CHECKBOX else [text]
    return [str(options.get(option, option)).strip() for option in chosen if option.strip()]


_READERS = {".csv": _read_table, ".tsv": _read_table, ".eaf": _read_elan, ".json": _read_json}
