"""The mesh, and where batches, parameters and optimizer state lie on it."""

import os
import socket
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from re2tal_jax.errors import ConfigError
from re2tal_jax.training.sharding import (
    MeshConfig,
    ShardingRule,
    check_batch_size,
    make_mesh,
    open_mesh,
    parameter_shardings,
    put_batch,
)
from tests import quick
from tests.training_stand_in import Loader, losses_of, make_parts, make_spec


def test_minus_one_takes_the_devices_that_are_left():
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2), jax.devices())
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert dict(make_mesh(MeshConfig(), jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=2, fsdp=2), r"has 4 places, but there are 8 devices\. Set data = -1"),
        (MeshConfig(data=-1, fsdp=3), r"8 devices are no multiple of 3\. Choose a divisor of 8"),
        (MeshConfig(data=-1, fsdp=-1), "one of them may be -1"),
        (MeshConfig(data=0), "every size is at least 1"),
    ],
)
def test_mesh_that_does_not_fit_the_devices_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(config, jax.devices())


def test_batch_must_split_over_devices_and_micro_batches():
    mesh = make_mesh(MeshConfig(), jax.devices())
    key = "config.train.batch_size"
    check_batch_size(16, mesh, accumulate=2, key=key)
    message = (
        r"^config.train.batch_size = 20 does not split evenly over 8 devices \(config.mesh.cpu_devices\) x 2 "
        r"micro-batches \(config.optimizer.accumulate\): choose a multiple of 16, for example 16\.$"
    )
    with pytest.raises(ConfigError, match=message):
        check_batch_size(20, mesh, accumulate=2, key=key)


def test_batch_is_split_over_all_devices():
    batch = put_batch(Loader(size=8).batch(0), make_mesh(MeshConfig(data=-1, fsdp=2), jax.devices()))
    assert {shard.data.shape[0] for shard in batch.video.addressable_shards} == {1}
    np.testing.assert_array_equal(batch.gt_segments, Loader(size=8).batch(0)["gt_segments"])


def test_large_parameters_are_split_along_their_largest_divisible_dimension_and_rules_come_first():
    shapes = {"a.kernel": (6, 12), "a.bias": (12,), "b.kernel": (7, 4), "odd.kernel": (7, 5), "c.kernel": (8, 4)}
    rules = (ShardingRule(pattern="^c", axes=(None, "data")),)
    config = MeshConfig(data=4, fsdp=2, fsdp_min_size=13, rules=rules)
    got = parameter_shardings(shapes, make_mesh(config, jax.devices()), config)
    assert {path: sharding.spec for path, sharding in got.items()} == {
        "a.kernel": P(None, "fsdp"),
        "a.bias": P(),
        "b.kernel": P(None, "fsdp"),
        "odd.kernel": P(),
        "c.kernel": P(None, "data"),
    }


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (ShardingRule(pattern="a", axes=("fsp",)), "no axis 'fsp'. Did you mean 'fsdp'"),
        (ShardingRule(pattern="a", axes=("data",)), r"a has shape \(6,\), and 6 is no multiple of the 4 devices"),
        (ShardingRule(pattern="a", axes=(None, None)), r"a has shape \(6,\)"),
        (ShardingRule(pattern="b", axes=()), "'b' decides no parameter"),
    ],
)
def test_sharding_rules_that_do_not_fit_are_refused(rule, message):
    config = MeshConfig(data=4, fsdp=2, rules=(rule,))
    with pytest.raises(ConfigError, match=message):
        parameter_shardings({"a": (6,)}, make_mesh(config, jax.devices()), config)


def test_moments_and_average_lie_like_their_parameter_and_no_device_holds_all():
    spec, _ = make_spec(MeshConfig(data=1, fsdp=8, fsdp_min_size=8), devices=8)
    state = spec.create()
    name = "backbone.proj.kernel"
    for array in (state.params[name], state.ema_params[name], state.opt_state.mu[name], state.opt_state.nu[name]):
        assert array.sharding.spec == P(None, "fsdp")
        assert {shard.data.shape for shard in array.addressable_shards} == {(3, 2)}
    assert state.step.sharding.spec == P()
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    script = """
        import sys
        import jax, numpy as np
        jax.config.update("jax_numpy_dtype_promotion", "strict")
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        from re2tal_jax.training.sharding import DistributedConfig, initialise_distributed
        port, rank = sys.argv[1], int(sys.argv[2])
        initialise_distributed(DistributedConfig(coordinator=f"localhost:{port}", num_processes=2, process_id=rank))
        from tests.training_stand_in import losses_of, make_parts, Loader
        print("losses", losses_of(make_parts(devices=4), rows=slice(4 * rank, 4 * rank + 4)))
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | quick.environment(devices=2)
    command = [sys.executable, "-c", textwrap.dedent(script), str(port)]
    processes = [
        subprocess.Popen(
            [*command, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    found = [[float(x) for x in out.split("losses [")[1].split("]")[0].split(",")] for out, _ in outputs]
    assert found[0] == found[1]
    np.testing.assert_allclose(found[0], losses_of(make_parts(devices=4)), rtol=1e-6)


def test_cpu_devices_that_come_too_late_are_refused():
    """This process has used its eight CPU devices already."""
    jax.devices()
    with pytest.raises(ConfigError, match=r"mesh\.cpu_devices = 3 comes too late"):
        open_mesh(MeshConfig(cpu_devices=3))
    with pytest.raises(ConfigError, match=r"mesh\.cpu_devices = 0 must be at least 1"):
        open_mesh(MeshConfig(cpu_devices=0))
    assert dict(open_mesh(MeshConfig()).shape) == {"data": 8, "fsdp": 1}
