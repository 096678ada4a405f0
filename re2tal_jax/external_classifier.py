"""Video-level scores of another classifier, which give classes to the segments of a class-agnostic localizer.

This is how ActivityNet results are reported: each segment is repeated for the video's best classes. State the
classifier beside every number: one checkpoint moves by 3 points of mAP with it.
"""

import hashlib
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from re2tal_jax.activitynet_format import load
from re2tal_jax.errors import ConfigError, DataError, did_you_mean

Fusion = Literal["product", "sqrt"]
Missing = Literal["error", "skip"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExternalClassifierConfig:
    """Which scores are fused, and how.

    Attributes:
        path: json of the form {"results": {video id: [score per class]}, "class" or "classes": [name, …]}.
        top_k: each segment is repeated for this many best classes of its video.
        fusion: "product" of both scores (CUHK's scores on ActivityNet), or its square root, "sqrt".
        softmax: the file holds logits.
        missing: a video without scores is an "error", or gets no detections and a line in the log ("skip").
    """

    path: str
    top_k: int = 2
    fusion: Fusion = "product"
    softmax: bool = False
    missing: Missing = "error"

    def __post_init__(self):
        for name, value, allowed in (
            ("fusion", self.fusion, get_args(Fusion)),
            ("missing", self.missing, get_args(Missing)),
        ):
            if value not in allowed:
                raise ConfigError(f"ExternalClassifierConfig.{name} = {value!r}. {did_you_mean(str(value), allowed)}")
        if self.top_k < 1:
            raise ConfigError(f"ExternalClassifierConfig.top_k = {self.top_k!r} is out of range; allowed: 1 or more.")


class ExternalClassifier:
    """The scores of `config.path`, read and checked at once.

    `skipped` collects the videos that had no scores, under the policy "skip".
    """

    def __init__(self, config: ExternalClassifierConfig, *, known_classes: Collection[str] | None = None):
        """Read the file.

        Args:
            config: which file, and how its scores are used.
            known_classes: the data set's classes; a class of the file that is not among them is an error.

        Raises:
            DataError: missing or malformed file (video named), scores negative or not finite, unknown class.
            ConfigError: top_k exceeds the number of classes.
        """
        content, self._name = load(config.path, "results")
        self.config = config
        self.skipped: set[str] = set()
        self.classes = _read_classes(content, self._name, known_classes)
        if config.top_k > len(self.classes):
            raise ConfigError(f"top_k = {config.top_k} exceeds the {len(self.classes)} classes of {self._name}.")
        self._scores = {
            video_id: _read_scores(f"{self._name}: {video_id}", scores, len(self.classes), config.softmax)
            for video_id, scores in content["results"].items()
        }

    def identity(self) -> dict[str, Any]:
        """Return what decides its part in detections, as JSON has it: a digest of all scores, and how they are used.

        Where the file lies decides nothing.
        """
        digest = hashlib.sha256("\0".join(self.classes).encode("utf-8", "surrogatepass"))
        for video_id, scores in sorted(self._scores.items()):
            digest.update(f"\0{video_id}\0".encode("utf-8", "surrogatepass") + scores.tobytes())
        used = {key: value for key, value in asdict(self.config).items() if key != "path"}
        return {"sha256": digest.hexdigest(), **used}

    def check_videos(self, video_ids: Iterable[str]) -> None:
        """Raise DataError if there are no scores for one of these videos, under the policy "error"."""
        for video_id in video_ids:
            if self.config.missing == "error" and video_id not in self._scores:
                self._miss(video_id)

    def fuse(
        self, video_id: str, segments: Float[np.ndarray, "N 2"], scores: Float[np.ndarray, " N"]
    ) -> tuple[Float[np.ndarray, "M 2"], Float[np.ndarray, " M"], tuple[str, ...]]:
        """Return the segments once per best class of the video, best class first, with fused scores and class names.

        M = N * top_k, or 0 for a video without scores under the policy "skip".

        Raises:
            DataError: no scores for the video under the policy "error".
        """
        if video_id not in self._scores:
            self._miss(video_id)
            return segments[:0], scores[:0], ()
        video_scores = self._scores[video_id]
        top = np.argsort(-video_scores, kind="stable")[: self.config.top_k]
        fused = (video_scores[top, None] * scores[None]).ravel()
        if self.config.fusion == "sqrt":
            fused = np.sqrt(fused)
        names = tuple(self.classes[k] for k in top for _ in range(len(scores)))
        return np.tile(segments, (len(top), 1)), fused.astype(scores.dtype), names

    def _miss(self, video_id: str) -> None:
        other = video_id[2:] if video_id.startswith("v_") else f"v_{video_id}"
        hint = f"It has {other!r}: the ids differ by the prefix 'v_'." if other in self._scores else ""
        text = f"{self._name}: no scores for video {video_id} among {len(self._scores)}. {hint}".rstrip()
        if self.config.missing == "error":
            raise DataError(f"{text} Complete the file, or set missing='skip' to leave such videos without detections.")
        if video_id not in self.skipped:
            logger.warning("%s Skipped.", text)
            self.skipped.add(video_id)


def _read_classes(content: Mapping[str, Any], name: str, known: Collection[str] | None) -> tuple[str, ...]:
    classes = content["class"] if "class" in content else content.get("classes")
    if not isinstance(classes, list) or not classes or not all(isinstance(label, str) for label in classes):
        raise DataError(f"{name}: expected 'class' or 'classes', a list of class names; found {classes!r:.80}.")
    if len(set(classes)) < len(classes):
        raise DataError(f"{name}: classes named twice: {sorted({c for c in classes if classes.count(c) > 1})}.")
    unknown = [label for label in classes if known is not None and label not in known]
    if unknown:
        raise DataError(
            f"{name}: {len(unknown)} of its {len(classes)} classes are unknown to the data set, first {unknown[0]!r}. "
            f"{did_you_mean(unknown[0], known or ())}"
        )
    return tuple(classes)


def _read_scores(what: str, scores: Any, num_classes: int, softmax: bool) -> Float[np.ndarray, " K"]:
    try:
        values = np.asarray(scores, np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{what}: expected one score per class: {error}.") from error
    if values.shape != (num_classes,):
        raise DataError(f"{what}: scores have shape {values.shape}; expected one for each of {num_classes} classes.")
    if not np.isfinite(values).all():
        raise DataError(f"{what}: {int((~np.isfinite(values)).sum())} scores are not finite.")
    if softmax:
        values = np.exp(values - values.max())
        return values / values.sum()
    if values.min() < 0:
        raise DataError(f"{what}: score {values.min()} is negative; if these are logits, set softmax=True.")
    return values
