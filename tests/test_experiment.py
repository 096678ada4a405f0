"""Configs made into what runs: the recipes, combinations that cannot run, and drop path through the whole detector."""

import functools
import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from re2tal_jax.errors import ConfigError
from re2tal_jax.experiment import check_shapes, draw_blueprint, make_detector, make_preprocess, resolved_config
from re2tal_jax.main import read_command
from re2tal_jax.reversible import REWIRED, Wiring, rewire
from re2tal_jax.settings import read_settings
from re2tal_jax.training.sharding import make_mesh
from re2tal_jax.types import Batch
from tests.system import CLASSES, ROOT, changed, tiny_config

TINY = tiny_config(Path("nowhere"))
TWIN = Wiring(alpha=0.0, beta=1.0, reversible=False)


def draw(config):
    settings = read_settings(config)
    blueprint = draw_blueprint(settings, make_mesh(settings.mesh, jax.devices()[:1]))
    check_shapes(settings, blueprint)
    return blueprint


@pytest.mark.parametrize(
    ("name", "parameters", "norms"),
    [
        ("anet", 27_850_470, 58),
        ("thumos", 27_850_470, 58),
        ("anet_slowfast101", 61_990_312, 416),
        ("thumos_slowfast101", 61_990_312, 416),
    ],
)
def test_a_recipe_is_ready_for_its_data(name, parameters, norms):
    """Published sizes of the backbones without head, and the norm tensors that recipes freeze (REFERENCE, item 13)."""
    settings = read_settings(read_command(["--config", str(ROOT / "configs" / f"{name}.py")]).config)
    blueprint = draw_blueprint(settings, make_mesh(settings.mesh, jax.devices()[:1]))
    rows = [row for row in blueprint.optimizer.table() if row.group != "backbone_constants"]
    assert sum(int(np.prod(row.shape)) for row in rows if row.path.startswith("backbone.")) == parameters
    frozen = [row for row in rows if row.frozen]
    assert len(frozen) == norms
    assert {row.group for row in frozen} == {"backbone_norms"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_snippets": 12}, "12 snippets are more than max_seq_len = 8"),
        ({"localizer__max_seq_len": 9}, "max_seq_len = 9 is no multiple of 2, which level 1 needs"),
        ({"localizer__window": 4}, "window = 4: expected -1 .* or an odd number"),
        ({"localizer__window": 7}, "max_seq_len = 8 is no multiple of 6, which level 0 needs .*window 7"),
        ({"localizer__arch": (1, 0, 2)}, "regression_range has 2 entries .* there are 3 levels"),
        ({"localizer__num_heads": 3}, "channels = 8 cannot be divided among num_heads = 3"),
        ({"localizer__name": "actionfomer"}, "Unknown localizer 'actionfomer'. Did you mean 'actionformer'"),
        ({"backbone__name": "video_swin_tny"}, "Unknown backbone 'video_swin_tny'. Did you mean 'video_swin_tiny'"),
        ({"backbone__name": None}, "config.backbone.name = None: it must be text"),
        ({"backbone__checkpoint": 3}, "config.backbone.checkpoint = 3: expected a folder, or None"),
        ({"backbone__num_heads": (3,)}, "Stage 0 has 8 channels .* the heads must divide the channels"),
        ({"backbone__depths": (2, 2)}, r"num_heads = \(2,\) has 1 stages, depths = \(2, 2\) has 2"),
        ({"data__name": "activtynet"}, "Unknown dataset 'activtynet'. Did you mean 'activitynet'"),
        ({"data__min_lengthratio": 0.1}, "Unknown key config.data.min_lengthratio. Did you mean 'min_length_ratio'"),
        ({"train__policy": {"name": "resise"}}, "Unknown sampling policy 'resise'. Did you mean 'resize'"),
        ({"train__policy": {"name": "random_trunc"}}, "config.train.policy lacks snippet_stride"),
        ({"eval__policy": {"name": "resize", "stride": 2}}, "Unknown key config.eval.policy.stride"),
        ({"eval__subset": ("a", "b")}, "mAP is of one subset, give one name"),
        ({"train__loader__on_error": "skp"}, "config.train.loader.on_error = 'skp' is not .*Did you mean 'skip'"),
        ({"train__mirror__flip": 50.0}, "mirror.flip = 50.0 is no probability"),
        ({"train__mirror__flip_classes": {"left": 1}}, "config.train.mirror.flip_classes.left = 1 has type int"),
        ({"mesh__data": 3}, "mesh .* has 3 places, but there are 1 devices"),
        ({"mesh__data": -1, "mesh__fsdp": -1}, "every size is at least 1, and one of them may be -1"),
        ({"optimizer__accumulate": 3}, "config.train.batch_size = 8 does not split .* 1 devices .* x 3 micro-batches"),
        ({"optimizer__schedule__warmup": {"steps": 20}}, "warm-up of 20 steps must be shorter than its length, 20"),
        ({"optimizer__schedule__length": {"steps": 20, "epochs": 2}}, "exactly one of steps and epochs"),
        ({"parameter_groups__backbone_lr": float("inf")}, "lr = inf.* must be >= 0 and finite"),
        ({"loop__checkpoint_every": {"steps": 0}}, "stop, evaluate_every, checkpoint_every are 20, 10 and 0 steps"),
        ({"checkpoints__keep_latest": 0}, "keep_latest = 0 must be at least 1, or nothing could be resumed"),
        ({"evaluation__tiou_thresholds": ()}, "expected different numbers above 0 up to 1"),
        ({"evaluation__tiou_thresholds": (0.5, 50.0)}, "expected different numbers above 0 up to 1"),
        ({"detector__snippet_loss_weight": -1.0}, "snippet_loss_weight = -1.0 must be finite and at least 0"),
        ({"external_classifier": {"path": "x.json"}}, "config.external_classifier names the classes, but .* = 2"),
        ({"backbone__mlp_ratio": float("inf")}, "mlp_ratio = inf makes no hidden channels"),
        ({"backbone__in_channels": 0}, "in_channels = 0: allowed is 1 or more"),
        ({"localizer__head_channels": -1}, "head_channels = -1: expected a positive number"),
        ({"localizer__loss_normalizer": float("inf")}, "loss_normalizer = inf: expected a positive number"),
        ({"optimizer__eps": 0.0}, "eps = 0.0 must be > 0 and finite"),
        ({"optimizer__schedule__min_lr": -1.0}, "min_lr = -1.0 must be >= 0 and finite"),
        ({"seed": -1}, "config.seed = -1: expected a whole number from 0"),
        ({"compute_dtype": "float16"}, "config.compute_dtype = 'float16' is not allowed"),
    ],
)
def test_settings_that_cannot_run_are_refused_without_data(changes, message):
    with pytest.raises(ConfigError, match=message):
        draw(changed(TINY, **changes))


def test_the_schedule_counts_the_epochs_of_the_data():
    schedule = {"decay": "constant", "length": {"epochs": 10}, "warmup": {"epochs": 2}}
    blueprint = draw(changed(TINY, optimizer__schedule=schedule)).for_epochs_of(5)
    for optimizer in (blueprint.optimizer, blueprint.spec.optimizer):
        rates = [float(optimizer.learning_rate(jnp.int32(step), jnp.float32(1.0))) for step in (5, 10, 20)]
        np.testing.assert_allclose(rates, [0.5, 1.0, 1.0])


@pytest.fixture(scope="module")
def detector():
    """The tiny detector, its drop path strong enough that every branch is dropped for some of the samples."""
    config = changed(TINY, backbone__drop_path_rate=0.6)
    return nnx.split(make_detector(read_settings(config))())


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return Batch(
        video=jnp.asarray(rng.integers(0, 256, (8, 8, 16, 16, 3), dtype=np.uint8)),
        frame_size=jnp.full((8, 2), 32.0),
        mask=jnp.ones((8, 8), bool),
        gt_segments=jnp.asarray([[[1.0, 4.0]]] * 8),
        gt_labels=jnp.asarray([[i % 2] for i in range(8)], jnp.int32),
        gt_mask=jnp.ones((8, 1), bool),
        window=jnp.arange(8, dtype=jnp.int32),
    )


@pytest.fixture(scope="module")
def gradients(detector, batch):
    """(wiring, step) -> loss and gradients; the key of a step is the run's with its number folded in."""
    structure, params = detector

    @functools.partial(jax.jit, static_argnums=0)
    def compute(wiring, params, batch, key):
        def loss(params):
            model = rewire(nnx.merge(structure, params), wiring)
            losses, _ = model.loss(batch.video.astype(jnp.float32), batch, model.initial_state(), key=key)
            return losses["total"]

        return jax.value_and_grad(loss)(params)

    def at(wiring, step):
        loss, gradient = compute(wiring, params, batch, jax.random.fold_in(jax.random.key(7), step))
        return float(loss), dict(nnx.to_flat_state(gradient))

    return functools.cache(at)


def test_drop_path_is_the_same_in_the_forward_pass_and_in_its_recomputation(gradients):
    """Reversible and stored gradients of the whole detector agree, at steps whose masks differ."""
    for step in (0, 1):
        loss, reversible = gradients(REWIRED, step)
        twin_loss, stored = gradients(TWIN, step)
        np.testing.assert_allclose(loss, twin_loss, rtol=1e-6)
        for path, gradient in stored.items():
            exact, found = np.asarray(gradient[...]), np.asarray(reversible[path][...])
            tolerance = 2e-5 * np.abs(exact).max() + 1e-9
            np.testing.assert_allclose(found, exact, atol=tolerance, err_msg=str(path))


def test_drop_path_differs_from_step_to_step(gradients):
    losses = {step: gradients(REWIRED, step)[0] for step in (0, 1)}
    assert abs(losses[0] - losses[1]) > 1e-3
    name = ("backbone", "stages", 0, "blocks", 1, "mlp", "fc1", "kernel")
    first, second = (np.asarray(gradients(REWIRED, step)[1][name][...]) for step in (0, 1))
    assert np.abs(first - second).max() > 0.1 * np.abs(first).max()


def test_mirroring_moves_labels_in_training_and_nothing_in_evaluation(batch):
    config = changed(TINY, train__mirror__flip=1.0, train__mirror__reverse=0.0, train__augment__crop=0.0)
    preprocess = make_preprocess(read_settings(config).train, CLASSES)
    straight, same = preprocess(batch, None)
    assert same is batch
    np.testing.assert_allclose(straight, batch.video, atol=1e-3)
    mirrored, turned = preprocess(batch, jax.random.key(0))
    np.testing.assert_allclose(mirrored, straight[:, :, :, ::-1], atol=1e-3)
    np.testing.assert_array_equal(turned.gt_labels, 1 - batch.gt_labels)


@pytest.mark.parametrize("name", ["anet", "thumos", "demo"])
def test_resolved_config_shows_every_default_and_reads_back_as_itself(name):
    settings = read_settings(importlib.import_module(f"configs.{name}").get_config().to_dict())
    resolved = resolved_config(settings)
    assert resolved["localizer"]["prior_prob"] == 0.01
    assert resolved["backbone"]["mlp_ratio"] == 4.0
    assert resolved["optimizer"]["eps"] == 1e-8
    assert resolved["train"]["loader"]["threads"] == 2
    again = read_settings(json.loads(json.dumps(resolved)))
    assert resolved_config(again) == resolved
