"""What a video is: a file, a record of an archive, or bytes in memory."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a file says about its video: frames, mean frames per second, seconds, and pixels as displayed (rotated)."""

    num_frames: int
    fps: float
    duration_sec: float
    height: int
    width: int


class VideoSource(ABC):
    """A video that is no file of its own, such as a record of an archive; its `str` is what errors call it.

    Instances are small and travel to other processes; what they read from is opened in the process that reads.
    """

    @abstractmethod
    def info(self) -> VideoInfo | None:
        """Return what `probe` would say, where that is known without reading, else None."""

    @property
    @abstractmethod
    def kept_in(self) -> Path:
        """A file that changes when the video does."""

    @abstractmethod
    def read(self) -> bytes:
        """Return the video as its file would have it.

        Raises:
            DataError: it cannot be read.
        """


@dataclass(frozen=True)
class VideoBytes:
    """A video in memory; `name` is what errors call it."""

    name: str
    content: bytes

    def __str__(self) -> str:
        return self.name


Video = str | Path | VideoSource | VideoBytes
"""What is read: a file, or what stands for one."""


def fetched(path: Video) -> str | Path | VideoBytes:
    """Return the video with its bytes in memory, unless it is a file.

    Raises:
        DataError: it cannot be read from where it is kept.
    """
    return VideoBytes(str(path), path.read()) if isinstance(path, VideoSource) else path
