"""A detector of two linear layers and a loader of random clips, with the interfaces of the real ones."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from re2tal_jax.errors import DataError
from re2tal_jax.training.checkpoint import CheckpointConfig, Checkpoints
from re2tal_jax.training.loop import LoopConfig, Run
from re2tal_jax.training.optim import Duration, OptimConfig, Rule, Schedule, make_optimizer
from re2tal_jax.training.sharding import MeshConfig, make_mesh, put_batch
from re2tal_jax.training.state import StateSpec, TrainState, describe_model, describe_state
from re2tal_jax.training.step import make_train_step
from re2tal_jax.types import Batch

B, T, FRAMES_PER_SNIPPET, HW, C, N, K = 8, 6, 2, 4, 16, 3, 2
VIDEOS = tuple(f"video_{i}" for i in range(40))


class Backbone(nnx.Module):
    """Mean over space and the frames of a snippet, then Linear and LayerNorm."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.proj = nnx.Linear(3, width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, video: jax.Array) -> jax.Array:
        x = video.reshape(video.shape[0], -1, FRAMES_PER_SNIPPET, *video.shape[2:]).mean((2, 3, 4))
        return jnp.tanh(self.norm(self.proj(x / 255.0)))


class Localizer(nnx.Module):
    """One score per snippet and class."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.head = nnx.Linear(width, K, rngs=rngs)

    def __call__(self, features: jax.Array) -> jax.Array:
        return self.head(features)


class StandIn(nnx.Module):
    """Squared error against which snippets lie in a segment, with dropout from the given key."""

    def __init__(self, width: int = C, rate: float = 0.2, *, rngs: nnx.Rngs):
        self.rate = rate
        self.backbone, self.localizer = Backbone(width, rngs), Localizer(width, rngs)

    def initial_state(self) -> dict[str, jax.Array]:
        return {"loss_normalizer": jnp.asarray(10.0)}

    def loss(self, video, batch: Batch, localizer_state, *, key):
        video = video * batch.frame_size[:, 0, None, None, None, None] / HW
        features = self.backbone(video)
        if key is not None and self.rate:
            features = jnp.where(jax.random.bernoulli(key, 1 - self.rate, features.shape), features, 0.0)
        times = jnp.arange(video.shape[1] // FRAMES_PER_SNIPPET, dtype=jnp.float32)[None, :, None]
        inside = (times >= batch.gt_segments[:, None, :, 0]) & (times < batch.gt_segments[:, None, :, 1])
        target = (inside & batch.gt_mask[:, None]).any(-1)
        squares = (self.localizer(features) - target[..., None].astype(jnp.float32)) ** 2
        normalizer = 0.9 * localizer_state["loss_normalizer"] + 0.1 * target.sum().astype(jnp.float32)
        return {"total": squares.mean(), "normalizer": normalizer}, {"loss_normalizer": normalizer}

    def predict(self, video, mask):
        scores = self.localizer(self.backbone(video))
        starts = jnp.broadcast_to(jnp.arange(scores.shape[1], dtype=jnp.float32), scores.shape[:2])
        return jnp.stack([starts, starts + 1], -1), scores, mask


def preprocess(batch: Batch, key) -> tuple[jax.Array, Batch]:
    video = batch.video.astype(jnp.float32)
    if key is not None:
        video = video + jax.random.uniform(key, (video.shape[0], 1, 1, 1, 1), maxval=9.0)
    return video, batch


class Loader:
    """Endless batches; batch i depends on the seed and i alone. `poison` is NaN from there on, `fails` is an error."""

    steps_per_epoch = 5
    windows = tuple(SimpleNamespace(record=SimpleNamespace(video_id=name)) for name in VIDEOS)

    def __init__(self, size: int = B, seed: int = 0, poison: int | None = None, fails: int | None = None):
        self.size, self.seed, self.poison, self.fails, self.position = size, seed, poison, fails, 0

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        while True:
            if self.position == self.fails:
                raise DataError("video_3: no frames")
            self.position += 1
            yield self.batch(self.position - 1)

    def batch(self, position: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([self.seed, position])
        starts = rng.uniform(0, T - 2, (self.size, N, 1)).astype(np.float32)
        return {
            "video": rng.integers(0, 255, (self.size, T * FRAMES_PER_SNIPPET, HW, HW, 3), dtype=np.uint8),
            "frame_size": np.full((self.size, 2), np.nan if position == self.poison else HW, np.float32),
            "mask": np.ones((self.size, T), bool),
            "gt_segments": np.concatenate([starts, starts + 2], -1),
            "gt_labels": rng.integers(0, K, (self.size, N)).astype(np.int32),
            "gt_mask": rng.random((self.size, N)) < 0.7,
            "window": rng.permutation(len(VIDEOS))[: self.size].astype(np.int32),
        }

    def batches(self, count: int) -> list[dict[str, np.ndarray]]:
        return [self.batch(i) for i in range(count)]

    def get_state(self) -> dict[str, int]:
        return {"position": self.position}

    def set_state(self, state: dict[str, int]) -> None:
        self.position = state["position"]


RULES = (
    Rule(name="frozen", pattern=r"^backbone\.norm\.", lr=1e-2, weight_decay=0.1, frozen=True),
    Rule(name="backbone", pattern=r"^backbone\.", lr=1e-2, weight_decay=0.1),
    Rule(name="localizer", pattern=r"", lr=3e-2, weight_decay=0.0),
)


def optim_config(**changes) -> OptimConfig:
    schedule = Schedule(warmup=Duration(steps=4), length=Duration(steps=40))
    return OptimConfig(**{"schedule": schedule, **changes})


def make_spec(
    mesh_config: MeshConfig | None = None,
    *,
    devices: int = 1,
    width: int = C,
    rate: float = 0.2,
    seed: int = 0,
    **optim,
) -> tuple[StateSpec, Mesh]:
    """Everything `train` needs of a model, on the first `devices` devices."""
    mesh_config = mesh_config or MeshConfig()
    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    model = describe_model(lambda: StandIn(width, rate, rngs=nnx.Rngs(seed)))
    optimizer = make_optimizer(optim_config(**optim), RULES, model.shapes, Loader.steps_per_epoch)
    return describe_state(model, optimizer, mesh, mesh_config), mesh


def read_jsonl(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Parts(NamedTuple):
    """What runs can share, so that the step is compiled once for several."""

    spec: StateSpec
    mesh: Mesh
    train_step: Any


def make_parts(*args, noise: bool = True, **kwargs) -> Parts:
    spec, mesh = make_spec(*args, **kwargs)
    return Parts(spec, mesh, make_train_step(spec, preprocess if noise else lambda b, key: preprocess(b, None), mesh))


class Hooked:
    """A train step before which something happens; `hook` gets the number of steps finished so far."""

    def __init__(self, step: Any, hook: Callable[[int], None]):
        self.step, self.hook = step, hook

    def lower(self, *args):
        return self.step.lower(*args)

    def __call__(self, state: TrainState, *args):
        self.hook(int(state.step))
        return self.step(state, *args)


def make_run(workdir: Path, parts: Parts, *, loader: Loader | None = None, evaluate=None, hook=None, **config) -> Run:
    """A run of 20 steps that logs every one; evaluations give a metric that is best at step 5."""
    durations = {"stop": 20, "evaluate_every": 20, "checkpoint_every": 10} | config
    return Run(
        config=LoopConfig(log_every_steps=1, **{k: Duration(steps=v) for k, v in durations.items()}),
        spec=parts.spec,
        train_step=Hooked(parts.train_step, hook) if hook else parts.train_step,
        mesh=parts.mesh,
        loader=loader or Loader(),
        key=jax.random.key(1),
        workdir=workdir,
        checkpoints=Checkpoints(workdir, CheckpointConfig()),
        evaluate=evaluate or (lambda params, step: {"average_mAP": 1.0 / (1 + abs(step - 5))}),
        saved_config={"name": "stand-in"},
    )


def bits(state: TrainState) -> list[bytes]:
    """Every bit of a state."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def losses_of(parts: Parts, steps: int = 3, rows: slice = slice(None)) -> list[float]:
    """Total losses of the first steps; `rows` are this process's part of every batch."""
    state, found = parts.spec.create(), []
    for batch in Loader().batches(steps):
        placed = put_batch({name: value[rows] for name, value in batch.items()}, parts.mesh)
        state, metrics = parts.train_step(state, placed, jax.random.key(1))
        found.append(float(metrics["loss/total"]))
    return found
