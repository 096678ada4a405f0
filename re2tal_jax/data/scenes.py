"""Pictures in motion: what the `synthetic` data set shows, as numbers and as pixels.

An actor has a place, a size and an angle. Its class says which of the three changes, and which way; the other two stand
still. Places wrap around the picture, sizes run through a sawtooth, angles through the circle, and all start anywhere:
in a single picture each class shows the same distribution of places, sizes and angles, so that only motion tells them
apart. Distractors look the same, at rest or moving up or down, and so does no presence of an object mean an action.

Speeds are per *step*, 1/96 of the video, whatever its frame rate: what 96 frames sampled from the video show.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

CLASSES = ("clockwise", "counterclockwise", "grow", "left", "right", "shrink")
DISTRACTORS = ("still", "up", "down")

FLIP = {"left": "right", "right": "left", "clockwise": "counterclockwise", "counterclockwise": "clockwise"}
"""What a class becomes when the picture is mirrored left to right; the others stay."""
REVERSE = {**FLIP, "grow": "shrink", "shrink": "grow"}
"""What a class becomes when time runs backward."""

STEPS = 96
SIZES = ((64, 64), (64, 80), (80, 64), (80, 80), (72, 96))
RATES = (8, 10, 12, 15)
NUM_FRAMES = (96, 160)
LENGTHS = (0.05, 0.6)
MAX_INSTANCES = 4
EMPTY_SHARE = 0.1

_SHIFT = (0.9 / 32, 1.6 / 32)  # picture widths a step
_CYCLE = (1 / 22, 1 / 12)  # sawtooth cycles a step
_TURN = (np.deg2rad(9.0), np.deg2rad(16.0))  # radians a step
_SIZE = (0.16, 0.42)  # half length of the actor, in the picture's shorter side
_DRIFT = (0.1 / 32, 0.4 / 32)
_CONTRAST = (60.0, 100.0)
_TEXTURE, _NOISE = 10.0, 5.0  # standard deviations in grey levels
_CHUNK = 32  # frames rendered at a time


@dataclass(frozen=True, kw_only=True)
class Actor:
    """A bar with a round head, seen in frames [start, end); place, phase of size and angle are those at `start`."""

    label: str
    start: int
    end: int
    x: float
    y: float
    phase: float
    angle: float
    speed: float
    body: tuple[float, float, float]
    head: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One video: its form, its actors in order of drawing, and its background (colour, drift in pictures a step)."""

    num_frames: int
    fps: int
    height: int
    width: int
    actors: tuple[Actor, ...]
    color: tuple[float, float, float]
    drift: tuple[float, float]

    @property
    def instances(self) -> tuple[Actor, ...]:
        """The actors whose motion is an action, in order of time."""
        return tuple(sorted((a for a in self.actors if a.label in CLASSES), key=lambda a: a.start))


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draw a video: 1-4 instances that do not overlap in time (none in a tenth), and up to one distractor."""
    height, width = SIZES[rng.integers(len(SIZES))]
    num_frames = int(rng.integers(NUM_FRAMES[0], NUM_FRAMES[1] + 1))
    color = rng.uniform(90, 165) + rng.uniform(-20, 20, 3)
    empty = rng.random() < EMPTY_SHARE
    spans = [] if empty else _spans(int(rng.integers(1, MAX_INSTANCES + 1)), num_frames, rng)
    actors = [_actor(str(rng.choice(CLASSES)), span, color, rng) for span in spans]
    for _ in range(int(rng.integers(1 if empty else 0, 2))):
        span = _spans(1, num_frames, rng)[0]
        actors.append(_actor(str(rng.choice(DISTRACTORS)), span, color, rng))
    heading, speed = rng.uniform(0, 2 * np.pi), rng.uniform(*_DRIFT)
    return Scene(
        num_frames=num_frames,
        fps=int(rng.choice(RATES)),
        height=height,
        width=width,
        actors=tuple(actors[i] for i in rng.permutation(len(actors))),
        color=_triple(color),
        drift=(float(speed * np.cos(heading)), float(speed * np.sin(heading))),
    )


def states(actor: Actor, num_frames: int) -> Float[np.ndarray, "F 4"]:
    """Return x, y (pictures), size (shorter sides) and angle (radians, clockwise) in each frame of the actor."""
    moved = np.arange(actor.end - actor.start) * actor.speed * (STEPS / num_frames)
    still = np.zeros_like(moved)
    x = actor.x + {"left": -moved, "right": moved}.get(actor.label, still)
    y = actor.y + {"up": -moved, "down": moved}.get(actor.label, still)
    phase = actor.phase + {"grow": moved, "shrink": -moved}.get(actor.label, still)
    angle = actor.angle + {"clockwise": moved, "counterclockwise": -moved}.get(actor.label, still)
    size = _SIZE[0] * (_SIZE[1] / _SIZE[0]) ** (phase % 1)
    return np.stack([x % 1, y % 1, size, angle % (2 * np.pi)], axis=1)


def render(scene: Scene, rng: np.random.Generator) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Yield the frames of a scene; `rng` draws the background's texture and the noise of every pixel."""
    texture = _texture_spectrum(scene.height, scene.width, rng)
    tracks = [states(actor, scene.num_frames) for actor in scene.actors]
    for first in range(0, scene.num_frames, _CHUNK):
        times = np.arange(first, min(first + _CHUNK, scene.num_frames))
        canvas = _background(scene, texture, times)
        for actor, track in zip(scene.actors, tracks, strict=True):
            seen = (times >= actor.start) & (times < actor.end)
            if seen.any():
                canvas[seen] = paint(canvas[seen], actor, track[times[seen] - actor.start])
        canvas += rng.standard_normal(canvas.shape, np.float32) * np.float32(_NOISE)
        yield from np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def _spans(count: int, num_frames: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Draw `count` stretches of frames with gaps between them; lengths are log-uniform in LENGTHS of the video."""
    while True:
        lengths = np.rint(np.exp(rng.uniform(np.log(LENGTHS[0]), np.log(LENGTHS[1]), count)) * num_frames).astype(int)
        free = num_frames - lengths.sum() - 2 * (count - 1)  # two frames at least between instances
        if free >= 0 and lengths.min() >= LENGTHS[0] * num_frames and lengths.max() <= LENGTHS[1] * num_frames:
            break
    cuts = np.sort(rng.integers(0, free + 1, count))
    starts = cuts + np.concatenate([[0], np.cumsum(lengths[:-1] + 2)])
    return [(int(s), int(s + n)) for s, n in zip(starts, lengths, strict=True)]


def _actor(label: str, span: tuple[int, int], color: np.ndarray, rng: np.random.Generator) -> Actor:
    """Draw an actor; its look comes from one distribution, whatever the label."""
    speeds = {"grow": _CYCLE, "shrink": _CYCLE, "clockwise": _TURN, "counterclockwise": _TURN}
    body = color + rng.uniform(*_CONTRAST) + rng.uniform(-15, 15, 3)
    head = color - rng.uniform(*_CONTRAST) + rng.uniform(-15, 15, 3)
    return Actor(
        label=label,
        start=span[0],
        end=span[1],
        x=float(rng.random()),
        y=float(rng.random()),
        phase=float(rng.random()),
        angle=float(rng.uniform(0, 2 * np.pi)),
        speed=float(rng.uniform(*speeds.get(label, _SHIFT))),
        body=_triple(np.clip(body, 10, 245)),
        head=_triple(np.clip(head, 10, 245)),
    )


def _triple(values: np.ndarray) -> tuple[float, float, float]:
    red, green, blue = (float(v) for v in values)
    return red, green, blue


def _texture_spectrum(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Return the Fourier transform (H, W // 2 + 1, 3) of a smooth random texture that wraps around."""
    noise = np.fft.rfft2(rng.standard_normal((height, width, 3)), axes=(0, 1))
    radius = np.hypot(np.fft.fftfreq(height, 1 / height)[:, None], np.fft.rfftfreq(width, 1 / width)[None])
    smooth = noise * (np.exp(-((radius / 5) ** 2)) * (radius > 0))[..., None]
    grey = 0.8 * smooth.mean(-1, keepdims=True) * np.sqrt(3) + 0.6 * smooth
    return grey * (_TEXTURE / np.fft.irfft2(grey, (height, width), axes=(0, 1)).std())


def _background(scene: Scene, texture: np.ndarray, times: np.ndarray) -> Float[np.ndarray, "F H W 3"]:
    """Return the texture moved by its drift, to fractions of a pixel, at each time."""
    steps = times * (STEPS / scene.num_frames)
    rows = np.exp(-2j * np.pi * np.fft.fftfreq(scene.height, 1 / scene.height) * (steps * scene.drift[1])[:, None])
    columns = np.exp(-2j * np.pi * np.fft.rfftfreq(scene.width, 1 / scene.width) * (steps * scene.drift[0])[:, None])
    moved = texture * rows[:, :, None, None] * columns[:, None, :, None]
    pictures = np.fft.irfft2(moved, (scene.height, scene.width), axes=(1, 2))
    return (pictures + np.asarray(scene.color)).astype(np.float32)


def paint(canvas: np.ndarray, actor: Actor, track: np.ndarray) -> np.ndarray:
    """Return the pictures (F, H, W, 3) with the actor over them; what leaves on one side comes in on the other."""
    height, width = canvas.shape[1:3]
    x, y, size, angle = (track[:, i, None, None].astype(np.float32) for i in range(4))
    side = min(height, width)
    dx = ((np.arange(width, dtype=np.float32) + 0.5) / width - x + 0.5) % 1 - 0.5
    dy = ((np.arange(height, dtype=np.float32)[:, None] + 0.5) / height - y + 0.5) % 1 - 0.5
    dx, dy, half = dx * width, dy * height, size * side
    along = dx * np.cos(angle) + dy * np.sin(angle)
    across = dy * np.cos(angle) - dx * np.sin(angle)
    bar = np.maximum(np.abs(along) - half, np.abs(across) - 0.3 * half)
    head = np.hypot(along - 0.55 * half, across) - 0.55 * half
    for distance, color in ((bar, actor.body), (head, actor.head)):
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        canvas = canvas + cover * (np.asarray(color, np.float32) - canvas)
    return canvas
