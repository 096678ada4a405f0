"""Snippet features in the place of videos: what a window shows, taken from the rows of a feature folder.

Policies decide about windows, masks and targets as for videos. `Resize` then interpolates all rows of a video to T; the
strided policies look for the row at each snippet's time, so that rows and snippets may have different strides.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from re2tal_jax.data.features.files import HDF5, Place, find_features, read_features
from re2tal_jax.data.manifest import Manifest, VideoEntry, read_manifest
from re2tal_jax.data.sampling import Policy, RandomSource, Resize, annotated_frames, frame_rate
from re2tal_jax.errors import ConfigError, DataError
from re2tal_jax.types import VideoRecord, Window

SNAP = 0.01
"""Rows are taken as they are where every snippet of a window is at most this far, in rows, from one."""

_TRIED = 10  # files that are opened to learn how many channels there are


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """Where features are and when their rows lie: row r is centred at (offset_frames + r * stride) / fps seconds.

    folder: with a file for each video, or one HDF5 file; the channels of several (RGB and flow) are joined.
    channels_first: files hold (channels, rows).
    key: which array, where a file holds several.
    stride, offset_frames: frames from row to row, and from the start to the centre of row 0, half the frames that a row
        is made of. None: what the manifest of an extracted folder says; without one, rows share the video evenly.
    fps: of the videos that the features were made of. None: what the annotation says of each.
    checkpoint: None, or how the SHA-256 of the backbone has to begin, as the manifest names it.
    """

    folder: str | tuple[str, ...]
    channels_first: bool = False
    key: str | None = None
    stride: int | None = None
    offset_frames: float | None = None
    fps: float | None = None
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        if not self.folders:
            raise ConfigError("features.folder names no folder.")
        if self.stride is not None and self.stride < 1:
            raise ConfigError(f"features.stride = {self.stride} must be at least 1, or None.")
        if self.offset_frames is not None and not (self.offset_frames >= 0 and self.stride is not None):
            raise ConfigError(
                f"features.offset_frames = {self.offset_frames} must be at least 0, and needs features.stride."
            )
        if self.fps is not None and not (0 < self.fps < float("inf") and self.stride is not None):
            raise ConfigError(f"features.fps = {self.fps} must be a positive number, and needs features.stride.")

    @property
    def folders(self) -> tuple[str, ...]:
        """All folders, in the order in which their channels are joined."""
        return (self.folder,) if isinstance(self.folder, str) else self.folder


class Line(NamedTuple):
    """When rows lie: row r at start_sec + r * seconds_per_row."""

    start_sec: float
    seconds_per_row: float


@dataclass(frozen=True)
class Features:
    """The features of a data set's videos; see `open_features`.

    `places` are the files of each video, one for each folder, `channels` that of a row of all folders together.
    """

    config: FeatureConfig
    places: Mapping[str, tuple[Place, ...]]
    manifest: Manifest | None
    channels: int

    def describe(self) -> str:
        """Return folders, channels and backbone in a line."""
        backbone = "" if self.manifest is None else f", backbone {self.manifest.checkpoint_sha256[:12]}"
        return f"features of {' and '.join(self.config.folders)}: {self.channels} channels{backbone}"

    def check_policy(self, policy: Policy, *, path: str) -> None:
        """Raise ConfigError for a policy that needs to know when rows lie, where nothing tells."""
        if not isinstance(policy, Resize) and not self._is_strided:
            raise ConfigError(
                f"{path}.policy walks in steps of frames, but nothing says how many frames lie between the rows of "
                f"{self.config.folders[0]}: set config.data.features.stride (and offset_frames), or take the policy "
                "'resize'."
            )

    def total_frames(self, record: VideoRecord) -> int:
        """Return how many frames a video has where its annotation does not say: by the manifest, else by its rows."""
        entry = self._entry(record)
        if entry is not None:
            return entry.num_frames
        return len(self._arrays(record)[0]) * (self.config.stride or 1)

    def window(
        self, policy: Policy, record: VideoRecord, index: int, *, rng: RandomSource | None = None
    ) -> tuple[Window, Float[np.ndarray, "T C"]]:
        """Return a window and its features, float32; snippets after the last row are masked and repeat it.

        Raises:
            DataError: a file that cannot be read, NaN, or a length that the video cannot have; with file and id.
        """
        arrays = self._arrays(record)
        length = len(arrays[0])
        entry = self._entry(record)
        total = entry.num_frames if entry else annotated_frames(record) or length * (self.config.stride or 1)
        window = policy.window(record, total, index, rng=rng)
        if isinstance(policy, Resize):
            rows = (np.arange(policy.num_snippets) + 0.5) * (length / policy.num_snippets) - 0.5
        else:
            rows = self._rows_of(window, self._line(record, entry, total))
            window = self._masked(window, rows, length)
        taken = np.concatenate([take_rows(array, rows) for array in arrays], axis=1)
        if not np.isfinite(taken).all():
            raise DataError(
                f"Video {record.video_id!r}: {self._names(record)} holds NaN or infinite values: extract or copy it "
                "again."
            )
        return window, taken

    @property
    def _is_strided(self) -> bool:
        return self.config.stride is not None or (self.manifest is not None and self.manifest.stride is not None)

    def _entry(self, record: VideoRecord) -> VideoEntry | None:
        return self.manifest.videos[record.video_id] if self.manifest is not None else None

    def _names(self, record: VideoRecord) -> str:
        return " or ".join(map(str, self.places[record.video_id]))

    def _line(self, record: VideoRecord, entry: VideoEntry | None, total_frames: int) -> Line:
        if entry is not None:
            return Line(entry.start_sec, entry.seconds_per_snippet)
        fps = self.config.fps or frame_rate(record, total_frames)
        assert self.config.stride is not None  # check_policy
        return Line((self.config.offset_frames or 0.0) / fps, self.config.stride / fps)

    @staticmethod
    def _rows_of(window: Window, line: Line) -> Float[np.ndarray, " T"]:
        """Return the row, in general between two, at the time of every snippet."""
        grid = window.grid
        seconds = grid.start_sec + np.arange(window.num_snippets) * grid.seconds_per_snippet
        rows = (seconds - line.start_sec) / line.seconds_per_row
        nearest = np.round(rows)
        return nearest if np.abs(rows - nearest).max() <= SNAP else rows

    @staticmethod
    def _masked(window: Window, rows: Float[np.ndarray, " T"], length: int) -> Window:
        """Return the window with snippets after the last row masked; one stays, so that none is masked as a whole."""
        there = max(int(np.count_nonzero(rows < length - 0.5)), 1)
        return dataclasses.replace(window, num_valid_snippets=min(window.num_valid_snippets, there))

    def _arrays(self, record: VideoRecord) -> list[np.ndarray]:
        """Return the rows of every folder, of one length that fits the video."""
        config = self.config
        try:
            arrays = [
                read_features(place, key=config.key, channels_first=config.channels_first)
                for place in self.places[record.video_id]
            ]
        except DataError as error:
            raise DataError(f"Video {record.video_id!r}: {error}") from error
        lengths = [len(array) for array in arrays]
        if max(lengths) - min(lengths) > 1:  # flow has one frame less than the video, so it may have one row less
            raise DataError(
                f"Video {record.video_id!r}: {self._names(record)} have {', '.join(map(str, lengths))} rows, which "
                "cannot be joined: they are of different videos or strides."
            )
        channels = sum(array.shape[1] for array in arrays)
        if channels != self.channels:
            hint = " Is it stored as (channels, rows)? Then set features.channels_first."
            raise DataError(
                f"Video {record.video_id!r}: {self._names(record)} has {channels} channels, expected {self.channels} "
                f"(config.backbone.channels).{hint if any(self.channels == len(a) for a in arrays) else ''}"
            )
        self._check_length(record, min(lengths))
        return [array[: min(lengths)] for array in arrays]

    def _check_length(self, record: VideoRecord, length: int) -> None:
        """Raise DataError for a number of rows that the video cannot have.

        By the manifest it is exact. By stride and rate it is between that of rows whose frames all lie in the video
        and that of rows that are centred in it, give or take 1 and 2 %.
        """
        where, entry = f"Video {record.video_id!r}: {self._names(record)}", self._entry(record)
        if entry is not None:
            if entry.rows != length:
                raise DataError(f"{where} has {length} rows, its manifest says {entry.rows}: extract or copy it again.")
            if abs(entry.duration_sec - record.duration_sec) > 1 + 0.02 * record.duration_sec:
                raise DataError(
                    f"{where} was extracted from a video of {entry.duration_sec:.1f} s, the annotation says "
                    f"{record.duration_sec:.1f} s: is it of the same video?"
                )
            return
        fps = self.config.fps or record.fps
        if self.config.stride is None or fps is None:
            return
        frames = record.duration_sec * fps
        most = frames / self.config.stride
        least = (frames - 2 * (self.config.offset_frames or 0.0)) / self.config.stride
        if not 0.98 * least - 1 <= length <= 1.02 * most + 1:
            raise DataError(
                f"{where} has {length} rows, but a video of {record.duration_sec:.1f} s at {fps:g} frames a second has "
                f"about {max(round(most), 1)} of stride {self.config.stride}: are config.data.features.stride and fps "
                "those of the features, and is the video the one that is annotated?"
            )


def take_rows(array: np.ndarray, rows: Float[np.ndarray, " T"]) -> Float[np.ndarray, "T C"]:
    """Return the rows of an array (L, C) as float32, those between two interpolated, those outside the nearest."""
    rows = np.clip(rows, 0, len(array) - 1)
    low = np.floor(rows).astype(np.int64)
    first = np.asarray(array[low], np.float32)
    share = (rows - low).astype(np.float32)[:, None]
    if not share.any():
        return first
    second = np.asarray(array[np.minimum(low + 1, len(array) - 1)], np.float32)
    return first * (1 - share) + second * share


def open_features(config: FeatureConfig, video_ids: Iterable[str]) -> Features:
    """Find the features of videos; those that some folder lacks are left out of `places`.

    Raises:
        ConfigError: stride, offset, rate or checkpoint of the config and of a manifest disagree.
        DataError: a folder that does not exist, or none of the first files can be read.
    """
    ids = list(video_ids)
    found = [find_features(folder, ids) for folder in config.folders]
    places = {video_id: tuple(f[video_id] for f in found) for video_id in ids if all(video_id in f for f in found)}
    manifests = [None if Path(f).suffix.lower() in HDF5 else read_manifest(Path(f)) for f in config.folders]
    for folder, manifest in zip(config.folders, manifests, strict=True):
        _check_manifest(config, Path(folder), manifest, manifests[0])
    manifest = manifests[0]
    if manifest is not None:
        places = {i: where for i, where in places.items() if all(i in m.videos for m in manifests if m is not None)}
    return Features(config, places, manifest, _channels(config, places, manifests))


def _check_manifest(config: FeatureConfig, folder: Path, manifest: Manifest | None, first: Manifest | None) -> None:
    if (manifest is None) != (first is None):
        raise ConfigError(f"config.data.features.folder: {folder} and {config.folders[0]}: only one has a manifest.")
    if manifest is None or first is None:
        if config.checkpoint is not None:
            raise ConfigError(
                f"config.data.features.checkpoint = {config.checkpoint!r}, but {folder} has no manifest that names the "
                "backbone: set it to None."
            )
        return
    if config.fps is not None:
        raise ConfigError(
            f"config.data.features.fps = {config.fps:g}, but the manifest of {folder} gives every video's: set it to "
            "None."
        )
    for key in ("stride", "offset_frames"):
        wanted, says = dataclasses.asdict(config)[key], getattr(manifest, key)
        if wanted is not None and wanted != says:
            raise ConfigError(f"config.data.features.{key} = {wanted}, but the manifest of {folder} says {says}.")
    if config.checkpoint is not None and not manifest.checkpoint_sha256.startswith(config.checkpoint):
        raise ConfigError(
            f"config.data.features.checkpoint = {config.checkpoint!r}, but the manifest of {folder} names "
            f"{manifest.checkpoint_sha256 or 'none'}: these features are of another backbone."
        )
    if (manifest.stride, manifest.offset_frames) != (first.stride, first.offset_frames):
        raise ConfigError(f"config.data.features.folder: {folder} and {config.folders[0]} have different strides.")


def _channels(config: FeatureConfig, places: Mapping[str, tuple[Place, ...]], manifests: list[Manifest | None]) -> int:
    """Return the channels of a row of all folders, by the manifests, else by the first file that can be read."""
    if all(manifest is not None for manifest in manifests):
        return sum(manifest.channels for manifest in manifests if manifest is not None)
    failure: DataError | None = None
    for where in list(places.values())[:_TRIED]:
        try:
            arrays = [read_features(p, key=config.key, channels_first=config.channels_first) for p in where]
            return sum(array.shape[1] for array in arrays)
        except DataError as error:
            failure = failure or error
    if failure is not None:
        raise failure
    return 0  # no video has features, which the caller reports with their names
