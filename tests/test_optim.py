"""Parameter groups, schedule, AdamW, clipping, moving average."""

import dataclasses
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints_convert.rules import flatten
from re2tal_jax.backbones import build_backbone
from re2tal_jax.errors import ConfigError
from re2tal_jax.training.optim import (
    Duration,
    OptimConfig,
    Rule,
    Schedule,
    assign_rules,
    ema_update,
    make_optimizer,
    recipe_rules,
)
from tests.parity import optim as parity
from tests.training_stand_in import optim_config

SHAPES = {
    "backbone.stages.0.blocks.0.attn.qkv.kernel": (4, 12),
    "backbone.stages.0.blocks.0.attn.qkv.bias": (12,),
    "backbone.stages.0.blocks.0.attn.relative_position_bias": (27, 2),
    "backbone.stages.0.blocks.0.norm1.scale": (4,),
    "backbone.stages.0.downsample.norm.bias": (4,),
    "backbone.norm3.scale": (4,),
    "localizer.head.conv.kernel": (3, 4, 4),
    "localizer.head.conv.bias": (4,),
    "localizer.norm.scale": (4,),
}


def rule(name, pattern, lr=1.0, weight_decay=0.0, frozen=False):
    return Rule(name=name, pattern=pattern, lr=lr, weight_decay=weight_decay, frozen=frozen)


def test_recipe_freezes_backbone_norms_and_decays_the_backbone_whole_but_only_kernels_of_the_localizer():
    rules = recipe_rules(backbone_lr=1e-5, localizer_lr=1e-3, weight_decay=0.05)
    optimizer = make_optimizer(optim_config(), rules, SHAPES, steps_per_epoch=1)
    rows = {row.path.split(".", 1)[1]: (row.group, row.lr, row.weight_decay, row.frozen) for row in optimizer.table()}
    assert rows == {
        "stages.0.blocks.0.attn.qkv.kernel": ("backbone", 1e-5, 0.05, False),
        "stages.0.blocks.0.attn.qkv.bias": ("backbone", 1e-5, 0.05, False),
        "stages.0.blocks.0.attn.relative_position_bias": ("backbone", 1e-5, 0.05, False),
        "stages.0.blocks.0.norm1.scale": ("backbone_norms", 1e-5, 0.05, True),
        "stages.0.downsample.norm.bias": ("backbone_norms", 1e-5, 0.05, True),
        "norm3.scale": ("backbone_norms", 1e-5, 0.05, True),
        "head.conv.kernel": ("localizer", 1e-3, 0.05, False),
        "head.conv.bias": ("localizer_no_decay", 1e-3, 0.0, False),
        "norm.scale": ("localizer_no_decay", 1e-3, 0.0, False),
    }


def test_statistics_and_fixed_positions_are_frozen_whatever_the_settings_and_only_where_they_exist():
    norm = "backbone.fast.stem.norm"
    constants = {f"{norm}.mean": (4,), f"{norm}.var": (4,), "backbone.pos_embed": (8, 4)}
    rules = recipe_rules(backbone_lr=1e-5, localizer_lr=1e-3, weight_decay=0.05, freeze_backbone_norms=False)
    assigned = assign_rules({**SHAPES, **constants}, rules)
    groups = {path: (r.name, r.frozen, r.weight_decay) for path, r in assigned.items()}
    assert {groups[path] for path in constants} == {("backbone_constants", True, 0.0)}
    assert not any(frozen for path, (_, frozen, _) in groups.items() if path not in constants)
    assert "backbone_constants" not in {r.name for r in assign_rules(SHAPES, rules).values()}


def test_an_optional_rule_alone_may_match_nothing(caplog):
    caplog.set_level("INFO")
    none = rule("none", "^head$")
    assign_rules({"a": (1,)}, (dataclasses.replace(none, optional=True), rule("all", "")))
    assert "group none" not in caplog.text
    with pytest.raises(ConfigError, match=r"rule 'none' .* matches no parameter"):
        assign_rules({"a": (1,)}, (none, rule("all", "")))


def test_slowfast_101_has_416_frozen_norm_tensors_and_as_many_statistics():
    """104 norms in each pathway: 33 blocks of three, four projections, the stem (REFERENCE section 3, 13)."""
    backbone = nnx.eval_shape(lambda: build_backbone("slowfast_r101"))
    shapes = {f"backbone.{path}": leaf.shape for path, leaf in flatten(backbone).items()} | {"head.kernel": (1, 1)}
    rules = recipe_rules(backbone_lr=1e-5, localizer_lr=1e-3, weight_decay=0.05)
    assigned = assign_rules(shapes, rules[:-1])
    counts = Counter((r.name, r.frozen) for path, r in assigned.items() if path.startswith("backbone."))
    kernels = 2 * (33 * 3 + 4 + 1) + 4  # one beside every norm, and the laterals
    assert counts == {("backbone_norms", True): 416, ("backbone_constants", True): 416, ("backbone", False): kernels}


def test_rules_replay_the_published_groups_and_schedules(parity_dir):
    rows = list(parity.replay(parity_dir / "optim", None))
    assert len(rows) >= 16
    assert [row for row in rows if not row.passed] == []


def test_first_matching_rule_wins_and_matches_are_logged(caplog):
    caplog.set_level("INFO")
    assigned = assign_rules({"a.kernel": (2, 3), "a.bias": (3,)}, (rule("kernels", "kernel$"), rule("all", "")))
    assert {path: r.name for path, r in assigned.items()} == {"a.kernel": "kernels", "a.bias": "all"}
    assert "group kernels ('kernel$'): 1 parameters, 6 values, lr 1, weight decay 0" in caplog.text


def test_all_faults_of_rules_are_named_at_once():
    rules = (rule("a", r"^backbon\."), rule("a", r"^backbone\."), rule("late", r"qkv"))
    with pytest.raises(ConfigError) as error:
        assign_rules(SHAPES, rules)
    text = str(error.value)
    assert "two rules are called 'a'" in text
    assert "no rule matches parameter 'localizer.head.conv.bias'" in text
    assert "rule 'a' ('^backbon\\\\.') matches no parameter that is left for it. Did you mean 'backbone'?" in text
    assert "rule 'late' ('qkv') matches no parameter that is left for it" in text


def test_impossible_values_are_refused():
    with pytest.raises(ConfigError, match="no regular expression"):
        rule("a", "(")
    with pytest.raises(ConfigError, match="must be >= 0"):
        rule("a", "", lr=-1.0)
    for given_twice in ({}, {"steps": 1, "epochs": 1.0}):
        with pytest.raises(ConfigError, match="exactly one of steps and epochs"):
            Duration(**given_twice)
    with pytest.raises(ConfigError, match="finite and >= 0"):
        Duration(epochs=math.nan)
    with pytest.raises(ConfigError, match="warm-up of 10 steps must be shorter than its length, 10 steps"):
        Schedule(warmup=Duration(epochs=2), length=Duration(steps=10)).resolve(5)
    with pytest.raises(ConfigError, match="multistep alone has them"):
        Schedule(length=Duration(steps=10), milestones=(Duration(steps=1),))
    with pytest.raises(ConfigError, match=r"ema_decay = 1.0 must be >= 0 and < 1"):
        optim_config(ema_decay=1.0)
    with pytest.raises(ConfigError, match="Every parameter is frozen"):
        make_optimizer(optim_config(), (rule("all", "", frozen=True),), SHAPES, 1)


@settings(deadline=None, max_examples=40)
@given(
    steps_per_epoch=st.integers(1, 50),
    warmup=st.integers(0, 5),
    epochs=st.integers(6, 30),
    peak=st.floats(1e-6, 1e-1),
)
def test_schedule_follows_the_closed_form(steps_per_epoch, warmup, epochs, peak):
    schedule = Schedule(warmup=Duration(epochs=warmup), length=Duration(epochs=epochs))
    start, end = warmup * steps_per_epoch, epochs * steps_per_epoch
    k = np.unique([0, 1, 2, max(start - 1, 1), start, start + 1, end // 2, end - 1, end, end + 2])
    k = np.pad(k, (0, 10 - len(k)), mode="edge")  # one shape, so that nothing is compiled anew
    cosine = 1e-8 + (peak - 1e-8) * (1 + np.cos(np.pi * np.minimum(k - start, end - start) / (end - start))) / 2
    want = np.where(k < start, peak * k / max(start - 1, 1), cosine)
    got = np.asarray(schedule.resolve(steps_per_epoch)(k, np.float32(peak)), np.float64)
    np.testing.assert_allclose(got, want, rtol=2e-6)
    if warmup:
        assert got[0] == 0
        np.testing.assert_allclose(got[(k == start) | ((k == start - 1) & (k > 0))], peak, rtol=2e-7)


def test_multistep_decays_at_its_milestones_and_constant_does_not():
    steps = np.arange(6)
    milestones = (Duration(steps=3), Duration(steps=5))
    multistep = Schedule(decay="multistep", warmup=Duration(steps=2), length=Duration(steps=6), milestones=milestones)
    np.testing.assert_allclose(multistep.resolve(1)(steps, np.float32(8)), [0, 4, 8, 0.8, 0.8, 0.08], rtol=1e-6)
    constant = Schedule(decay="constant", length=Duration(epochs=1.2))
    np.testing.assert_array_equal(constant.resolve(5)(steps, np.float32(8)), 8.0)


def adamw_by_hand(p, gradients, lrs, wd, b1, b2, eps, clip):
    """The loop of torch.optim.AdamW and clip_grad_norm_ in float64, over a dict of arrays that are one group each."""
    p = {k: v.astype(np.float64) for k, v in p.items()}
    m, v = ({k: np.zeros_like(x) for k, x in p.items()} for _ in range(2))
    for t, (g, lr) in enumerate(zip(gradients, lrs, strict=True), start=1):
        norm = np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in g.values()))
        for k in p:
            gk = g[k].astype(np.float64) * min(1.0, clip / (norm + 1e-6))
            p[k] *= 1 - lr[k] * wd[k]
            m[k] = b1 * m[k] + (1 - b1) * gk
            v[k] = b2 * v[k] + (1 - b2) * gk**2
            p[k] -= lr[k] / (1 - b1**t) * m[k] / (np.sqrt(v[k] / (1 - b2**t)) + eps)
    return p


@pytest.mark.parametrize("b2", [0.999, 0.98])
def test_update_is_torch_adamw_with_global_clipping(b2):
    rng = np.random.default_rng(0)
    rules = (rule("a", "^a$", lr=0.1, weight_decay=0.3), rule("b", "^b$", lr=0.02))
    params = {"a": rng.normal(size=(3, 2)).astype(np.float32), "b": rng.normal(size=4).astype(np.float32)}
    steps = [{k: (5 * rng.normal(size=x.shape)).astype(np.float32) for k, x in params.items()} for _ in range(6)]
    steps[2] = {k: g * np.float32(0.01) for k, g in steps[2].items()}  # one below the bound
    config = dataclasses.replace(optim_config(b2=b2, clip_norm=1.0), schedule=Schedule(length=Duration(steps=8)))
    optimizer = make_optimizer(config, rules, {k: x.shape for k, x in params.items()}, 1)
    update = jax.jit(optimizer.update)
    got, state = jax.tree.map(jnp.asarray, params), optimizer.init(params)
    for k, gradients in enumerate(steps):
        got, state, metrics = update(gradients, state, got, jnp.int32(k))
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)  # before clipping
    peaks = {"a": 0.1, "b": 0.02}
    lrs = [{n: 1e-8 + (p - 1e-8) * (1 + np.cos(np.pi * k / 8)) / 2 for n, p in peaks.items()} for k in range(6)]
    want = adamw_by_hand(params, steps, lrs, {"a": 0.3, "b": 0.0}, 0.9, b2, 1e-8, 1.0)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=1e-5)  # of steps of 0.1
    np.testing.assert_allclose(metrics["lr/a"], lrs[5]["a"], rtol=1e-6)


def test_frozen_parameters_have_no_optimizer_state():
    params = {path: jnp.ones(shape) for path, shape in SHAPES.items()}
    rules = recipe_rules(backbone_lr=1e-5, localizer_lr=1e-3, weight_decay=0.05)
    optimizer = make_optimizer(OptimConfig(schedule=Schedule(length=Duration(steps=9))), rules, SHAPES, 1)
    assert sorted(optimizer.init(params).mu) == sorted(p for p in SHAPES if "backbone" not in p or "norm" not in p)


def test_average_follows_by_one_minus_decay_and_keeps_what_never_changes_bit_for_bit():
    average = ema_update(
        {"a": jnp.float32([1.0]), "b": jnp.float32([0.1])}, {"a": jnp.float32([2.0]), "b": jnp.float32([0.1])}, 0.9
    )
    np.testing.assert_allclose(average["a"], [1.1], rtol=1e-6)
    assert average["b"].tobytes() == np.float32([0.1]).tobytes()
