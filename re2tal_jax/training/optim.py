"""What is learned how fast: parameter groups by (regex, values) rules, the schedule, AdamW, clipping and the average.

Parameters are known by their '.'-joined path, `backbone.stages.0.blocks.1.attn.qkv.kernel`. The first rule whose
pattern is found in a path decides its group; frozen parameters get neither gradient nor optimizer state.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from re2tal_jax.errors import ConfigError, did_you_mean

log = logging.getLogger(__name__)

Params = dict[str, Array]
LearningRate = Callable[[Int[Array, "..."], Float[Array, "..."]], Float[Array, "..."]]

BACKBONE_NORMS = r"^backbone\.(.*\.)?[^.]*(norm|bn|ln)[^.]*\.(scale|bias)$"
CONSTANTS = "backbone_constants"
BACKBONE_CONSTANTS = r"^backbone\.(.*\.)?([^.]*(norm|bn|ln)[^.]*\.(mean|var)|pos_embed)$"


@dataclass(frozen=True, kw_only=True)
class Duration:
    """A length of training, in optimizer steps or in epochs (passes over the training set): exactly one of them."""

    steps: int | None = None
    epochs: float | None = None

    def __post_init__(self):
        given = [value for value in (self.steps, self.epochs) if value is not None]
        if len(given) != 1:
            raise ConfigError(
                f"a duration has exactly one of steps and epochs; got steps = {self.steps} and epochs = {self.epochs}. "
                "To count in the other one set this to None, as in --config.loop.stop.steps=100 "
                "--config.loop.stop.epochs=None."
            )
        if not (math.isfinite(given[0]) and given[0] >= 0):
            raise ConfigError(f"a duration of {given[0]} is not allowed: it must be finite and >= 0.")

    def to_steps(self, steps_per_epoch: int) -> int:
        """Return this length in steps, rounded to the nearest."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None  # __post_init__
        return round(self.epochs * steps_per_epoch)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One parameter group: the paths in which `pattern` is found, unless an earlier rule took them.

    `lr` is the group's peak learning rate. `weight_decay` is decoupled: a step subtracts lr * weight_decay * parameter.
    An `optional` rule may match nothing: it is for parameters that some models have.
    """

    name: str
    pattern: str
    lr: float
    weight_decay: float
    frozen: bool = False
    optional: bool = False

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(
                f"rule {self.name!r}: pattern {self.pattern!r} is no regular expression: {error}."
            ) from None
        if not (0 <= self.lr < math.inf and 0 <= self.weight_decay < math.inf):
            values = f"lr = {self.lr}, weight_decay = {self.weight_decay}"
            raise ConfigError(f"rule {self.name!r}: {values} must be >= 0 and finite.")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate over steps k, counted from 0, the same shape for every group.

    cosine: k / (warmup - 1) of the peak while k < warmup, then a half cosine that reaches `min_lr` at `length`. The
    first step has rate 0 and both k = warmup - 1 and k = warmup have the peak, as the published recipe does.
    multistep: k / warmup of the peak, then the peak times `gamma` for every milestone passed. constant: the peak after
    such a warm-up. Training may stop before `length`, the rate stays at its last value after it.
    """

    decay: Literal["cosine", "multistep", "constant"] = "cosine"
    length: Duration
    warmup: Duration = Duration(steps=0)
    min_lr: float = 1e-8
    milestones: tuple[Duration, ...] = ()
    gamma: float = 0.1

    def __post_init__(self):
        for name, value in (("min_lr", self.min_lr), ("gamma", self.gamma)):
            if not 0 <= value < math.inf:
                raise ConfigError(f"schedule: {name} = {value} must be >= 0 and finite.")
        if bool(self.milestones) != (self.decay == "multistep"):
            raise ConfigError(
                f"decay = {self.decay!r} with {len(self.milestones)} milestones: multistep alone has them."
            )

    def resolve(self, steps_per_epoch: int) -> LearningRate:
        """Return the function (step, peak rate) -> rate; both may be arrays that broadcast.

        Raises:
            ConfigError: a warm-up that is not shorter than the schedule.
        """
        warmup, length = self.warmup.to_steps(steps_per_epoch), self.length.to_steps(steps_per_epoch)
        if warmup >= length:
            raise ConfigError(f"schedule: warm-up of {warmup} steps must be shorter than its length, {length} steps.")
        milestones = jnp.asarray([m.to_steps(steps_per_epoch) for m in self.milestones], jnp.int32)

        def learning_rate(step: Int[Array, "..."], peak: Float[Array, "..."]) -> Float[Array, "..."]:
            k, peak = jnp.asarray(step, jnp.float32), jnp.asarray(peak, jnp.float32)
            if self.decay == "cosine":
                # (1 + cos(pi * x)) / 2 = sin(pi / 2 * (1 - x))**2, which keeps its digits where the rate is small.
                left = jnp.clip((length - k) / (length - warmup), 0.0, 1.0)
                after = self.min_lr + (peak - self.min_lr) * jnp.sin(jnp.pi / 2 * left) ** 2
                rising = peak * k / max(warmup - 1, 1)
            else:
                passed = (jnp.asarray(step)[..., None] >= milestones).sum(-1)
                after = peak * jnp.float32(self.gamma) ** passed.astype(jnp.float32)
                rising = peak * k / max(warmup, 1)
            return jnp.where(k < warmup, rising, after)

        return learning_rate


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) with the arithmetic of torch.optim.AdamW.

    `clip_norm` bounds the norm of all trainable gradients together (None: no bound). `ema_decay` belongs to the moving
    average of the parameters that is evaluated (0: evaluate the parameters themselves). `accumulate` is the number of
    micro-batches whose mean gradient makes one step.
    """

    schedule: Schedule
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    ema_decay: float = 0.999
    accumulate: int = 1

    def __post_init__(self):
        for name in ("b1", "b2", "ema_decay"):
            if not 0 <= dataclasses.asdict(self)[name] < 1:
                raise ConfigError(f"{name} = {dataclasses.asdict(self)[name]} must be >= 0 and < 1.")
        if not 0 < self.eps < math.inf:
            raise ConfigError(f"eps = {self.eps} must be > 0 and finite.")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"clip_norm = {self.clip_norm} must be > 0, or None for no clipping.")
        if self.accumulate < 1:
            raise ConfigError(f"accumulate = {self.accumulate} must be >= 1.")


class ParameterRow(NamedTuple):
    """One line of the parameter table."""

    path: str
    shape: tuple[int, ...]
    group: str
    lr: float
    weight_decay: float
    frozen: bool


def recipe_rules(
    *,
    localizer_lr: float,
    weight_decay: float,
    backbone_lr: float | None = None,
    backbone_weight_decay: float | None = None,
    freeze_backbone: bool = False,
    freeze_backbone_norms: bool = True,
    decay_kernels_only: bool = True,
) -> tuple[Rule, ...]:
    """Return the groups of the published recipes for a model whose parts are called backbone and localizer.

    The backbone decays whole, biases and tables included (by `backbone_weight_decay`, None: as the localizer), and its
    norms are frozen. What it keeps but never learns, statistics of batch norms and fixed positions, is frozen whatever
    the settings. Of the localizer only kernels decay; `decay_kernels_only=False`: everything does.
    `freeze_backbone`: all of the backbone keeps its values, whatever its rate. `backbone_lr=None` without that: none is
    there, training is on features.
    """
    rules = []
    if backbone_lr is not None or freeze_backbone:
        decay = weight_decay if backbone_weight_decay is None else backbone_weight_decay
        rate = 0.0 if backbone_lr is None else backbone_lr
        backbone = Rule(name="backbone", pattern=r"^backbone\.", lr=rate, weight_decay=decay, frozen=freeze_backbone)
        constants = Rule(name=CONSTANTS, pattern=BACKBONE_CONSTANTS, lr=0, weight_decay=0, frozen=True, optional=True)
        rules.append(constants)
        if freeze_backbone_norms and not freeze_backbone:
            rules.append(dataclasses.replace(backbone, name="backbone_norms", pattern=BACKBONE_NORMS, frozen=True))
        rules.append(backbone)
    if decay_kernels_only:
        rules.append(Rule(name="localizer", pattern=r"\.kernel$", lr=localizer_lr, weight_decay=weight_decay))
        rules.append(Rule(name="localizer_no_decay", pattern=r"", lr=localizer_lr, weight_decay=0.0))
    else:
        rules.append(Rule(name="localizer", pattern=r"", lr=localizer_lr, weight_decay=weight_decay))
    return tuple(rules)


def assign_rules(shapes: Mapping[str, tuple[int, ...]], rules: tuple[Rule, ...]) -> dict[str, Rule]:
    """Return the rule of every parameter path, and log what each rule matched.

    Raises:
        ConfigError: two rules of one name, a parameter that no rule matches, or a rule that matches no parameter that
            an earlier rule left, unless it is optional: all of them in one message.
    """
    assignment = {path: rule for path in shapes for rule in [_first(rules, path)] if rule is not None}
    problems = [f"two rules are called {n!r}" for n in sorted({r.name for r in rules}) if _count(rules, n) > 1]
    problems += [f"no rule matches parameter {path!r}" for path in shapes if path not in assignment]
    for rule in rules:
        matched = [path for path, chosen in assignment.items() if chosen is rule]
        if rule.optional and not matched:
            continue
        values = sum(math.prod(shapes[path]) for path in matched)
        how = "frozen" if rule.frozen else f"lr {rule.lr:g}, weight decay {rule.weight_decay:g}"
        log.info("group %s (%r): %d parameters, %d values, %s", rule.name, rule.pattern, len(matched), values, how)
        for path in matched:
            log.debug("group %s: %s %s", rule.name, path, shapes[path])
        if not matched:
            words = did_you_mean(rule.pattern.strip("^$\\."), {path.split(".")[0] for path in shapes})
            problems.append(f"rule {rule.name!r} ({rule.pattern!r}) matches no parameter that is left for it. {words}")
    if problems:
        raise ConfigError("Parameter groups do not fit the model:\n  " + "\n  ".join(problems))
    return assignment


def _first(rules: tuple[Rule, ...], path: str) -> Rule | None:
    return next((rule for rule in rules if re.search(rule.pattern, path)), None)


def _count(rules: tuple[Rule, ...], name: str) -> int:
    return sum(rule.name == name for rule in rules)


@dataclass(frozen=True)
class Optimizer:
    """The update of all parameters of one model; see `make_optimizer`."""

    config: OptimConfig
    rules: tuple[Rule, ...]
    shapes: Mapping[str, tuple[int, ...]]
    assignment: Mapping[str, Rule]
    learning_rate: LearningRate
    adam: optax.GradientTransformation

    def table(self) -> list[ParameterRow]:
        """Return path, shape, group, peak rate, decay and frozen of every parameter."""
        rows = ((path, shape, self.assignment[path]) for path, shape in self.shapes.items())
        return [ParameterRow(p, shape, r.name, r.lr, r.weight_decay, r.frozen) for p, shape, r in rows]

    def split(self, params: Params) -> tuple[Params, Params]:
        """Return the trainable and the frozen parameters."""
        trainable = {path: value for path, value in params.items() if not self.assignment[path].frozen}
        return trainable, {path: value for path, value in params.items() if self.assignment[path].frozen}

    def init(self, params: Params) -> Any:
        """Return the moments of the trainable parameters."""
        return self.adam.init(self.split(params)[0])

    def update(
        self, gradients: Params, state: Any, trainable: Params, step: Int[Array, ""]
    ) -> tuple[Params, Any, dict[str, Float[Array, ""]]]:
        """Return the trainable parameters after one step, the new moments, and `grad_norm` and `lr/<group>` to log."""
        rates = {r.name: self.learning_rate(step, jnp.float32(r.lr)) for r in self.rules if not r.frozen}
        norm = optax.tree.norm(gradients)
        if self.config.clip_norm is not None:
            scale = jnp.minimum(self.config.clip_norm / (norm + 1e-6), 1.0)  # 1e-6 as torch.nn.utils.clip_grad_norm_
            gradients = {path: g * scale for path, g in gradients.items()}
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to the power of an integer count
            moved, state = self.adam.update(gradients, state)
        directions = cast(Params, moved)
        updated = {}
        for path, value in trainable.items():
            rule = self.assignment[path]
            updated[path] = value - rates[rule.name] * (directions[path] + rule.weight_decay * value)
        return updated, state, {"grad_norm": norm, **{f"lr/{name}": rate for name, rate in rates.items()}}


def make_optimizer(
    config: OptimConfig, rules: tuple[Rule, ...], shapes: Mapping[str, tuple[int, ...]], steps_per_epoch: int
) -> Optimizer:
    """Bind rules and schedule to a model's parameters, given by path and shape.

    Raises:
        ConfigError: rules that do not fit the parameters, nothing left to train, an impossible schedule.
    """
    assignment = assign_rules(shapes, rules)
    if all(rule.frozen for rule in assignment.values()):
        raise ConfigError("Every parameter is frozen: let at least one rule train.")
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    return Optimizer(config, rules, dict(shapes), assignment, config.schedule.resolve(steps_per_epoch), adam)


def ema_update(average: Params, params: Params, decay: float) -> Params:
    """Return decay * average + (1 - decay) * params, written so that a parameter that never changes stays bit-equal."""
    return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, params)
