"""What a run writes: JSONL that survives a resume, TensorBoard, a console line; memory."""

import logging
import resource

import jax
import jax.numpy as jnp
import pytest

from re2tal_jax.training.metrics import (
    MetricWriter,
    Progress,
    drop_lines_after,
    format_seconds,
    memory_estimate,
    peak_memory,
)
from tests.training_stand_in import read_jsonl


def test_lines_beyond_the_resumed_step_and_cut_ones_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}\n{"step": 3, "a": 3.0}\n{"step": 2, "a"')
    drop_lines_after(path, 2)
    assert path.read_text() == '{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resumed_writer_leaves_no_duplicate_steps_and_flushes_every_line(tmp_path, caplog):
    first = MetricWriter(tmp_path, resumed_step=0)
    for step in (1, 2, 3):
        first.write(step, {"loss/total": step / 2, "eval/mAP@0.5": 0.0})
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 3  # before it is closed
    second = MetricWriter(tmp_path, resumed_step=2)
    second.write(3, {"loss/total": jnp.float32(1.5)})
    first.close()
    second.close()
    assert [(line["step"], line["loss/total"]) for line in read_jsonl(tmp_path / "metrics.jsonl")] == [
        (1, 0.5),
        (2, 1.0),
        (3, 1.5),
    ]
    assert any((tmp_path / "tensorboard").iterdir())
    assert "illegal" not in caplog.text  # tensorboardX's word for an @ in a name


def test_only_one_process_writes(tmp_path):
    writer = MetricWriter(tmp_path, resumed_step=0, enabled=False)
    writer.write(1, {"a": 1.0})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_line_tells_means_since_the_last_one_and_leaves_pauses_out(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    clock = iter([0.0, 20.0, 20.0])
    monkeypatch.setattr("re2tal_jax.training.metrics.time.monotonic", lambda: next(clock))
    progress = Progress(102, jax.devices()[:1])
    progress.add({"loss/total": 1.0, "grad_norm": 4.0})
    progress.add({"loss/total": 2.0, "grad_norm": 6.0})
    progress.waited(0.5)
    progress.pause(16.0)
    scalars = progress.report(2)
    assert "step 2/102 | ETA 00:03:20 | 2.000 s/step | total 1.5000 | grad norm 5.000 | peak host RSS" in caplog.text
    assert scalars["loss/total"] == 1.5
    assert scalars["sec_per_step"] == 2.0
    assert scalars["data_sec_per_step"] == 0.25
    assert scalars["peak_mib/host_RSS"] > 10


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "00:00:00"), (3723, "01:02:03"), (93784, "1d 02:03:04"), (float("nan"), "?")]
)
def test_times_are_told_in_hours_and_days(seconds, text):
    assert format_seconds(seconds) == text


class FakeDevice:
    def __init__(self, stats):
        self.stats = stats

    def memory_stats(self):
        return self.stats


def test_peak_is_that_of_the_fullest_device_or_of_the_process():
    devices = [FakeDevice({"peak_bytes_in_use": 5}), FakeDevice({"peak_bytes_in_use": 7})]
    assert peak_memory(devices) == ("device", 7)
    where, size = peak_memory([FakeDevice(None)])
    assert where == "host RSS"
    assert size <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_memory_estimate_counts_donated_arguments_once():
    x = jax.ShapeDtypeStruct((1024, 256), jnp.float32)  # 1 MiB
    estimate = memory_estimate(jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile())
    assert (estimate.arguments, estimate.outputs, estimate.shared) == (2**20, 2**20, 2**20)
    assert estimate.peak == 2**20 + estimate.temporary
    assert str(estimate).startswith("1.0 MiB per device (arguments 1.0")
