"""The largest step that fits: the search itself on made-up memory, what it varies, and one search that compiles."""

import importlib
import re
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from re2tal_jax.accelerators import is_available
from re2tal_jax.config import read_config_file
from re2tal_jax.errors import ConfigError
from re2tal_jax.experiment import draw_blueprint
from re2tal_jax.modes.fit import MARGIN, largest_that_fits, quantity
from re2tal_jax.settings import read_settings
from re2tal_jax.training.sharding import make_mesh
from tests.system import changed

pytest_plugins = "tests.system_fixtures"

CONFIGS = Path(__file__).parents[1] / "configs"


def search(needed, limit, start, power=1, most=None):
    """What is found, and how many programs were compiled for it."""
    tried = []

    def counted(n):
        assert n not in tried, "compiled twice"
        tried.append(n)
        return needed(n)

    return largest_that_fits(counted, limit, start, power=power, most=most), len(tried)


@given(
    st.integers(0, 10**9), st.integers(1, 10**7), st.integers(1, 40), st.integers(1, 8), st.floats(0, 3), st.booleans()
)
def test_the_largest_that_fits_is_found_whatever_the_steps_of_memory(base, slope, start, step, ratio, square):
    """Memory that grows in jumps of `step` units, as padding makes it; beside it a limit below, at or above it."""
    power = 2 if square else 1
    needed = lambda n: base + slope * (-(-n // step) * step) ** power  # noqa: E731
    limit = int(ratio * needed(start))
    found, programs = search(needed, limit, start, power)
    assert found.largest == 0 or needed(found.largest) <= limit
    assert programs <= 24
    if found.too_large is None:
        assert found.largest >= 1000 * start
    else:
        assert found.too_large == found.largest + 1
        assert needed(found.too_large) > limit


@pytest.mark.parametrize(("power", "largest"), [(1, 900), (2, 30)])
def test_four_programs_are_enough_where_memory_is_linear(power, largest):
    found, programs = search(lambda n: 100 + n**power, 1000, 8, power)
    assert (found.largest, found.too_large) == (largest, largest + 1)
    assert programs == 4


def test_memory_that_does_not_grow_ends_the_search():
    found, programs = search(lambda n: 5, 10, 1)
    assert found.too_large is None
    assert found.largest > 1000
    assert programs < 20


def test_nothing_fits_where_the_smallest_does_not():
    found, _ = search(lambda n: 100 + n, 100, 8)
    assert (found.largest, found.too_large) == (0, 1)


def features():
    return read_settings(read_config_file(CONFIGS / "anet_features.py"))


@pytest.fixture(scope="module")
def anet():
    return read_settings(read_config_file(CONFIGS / "anet.py"))


def test_frames_come_in_what_the_coarsest_level_takes_and_the_localizer_follows(anet):
    frames = quantity("frames", anet, 1)
    assert (frames.unit, frames.start) == (32 * 4, 6)  # six levels of stride 2, four frames a snippet
    longer = frames.apply(12)
    assert (longer.num_snippets, longer.localizer["max_seq_len"]) == (384, 384)
    assert frames.describe(12) == "1,536 frames"
    roomy = replace(anet, localizer=dict(anet.localizer, max_seq_len=2304))
    assert quantity("frames", roomy, 1).apply(12).localizer["max_seq_len"] == 2304


def test_batches_split_evenly_over_devices_and_micro_batches(anet):
    twice = replace(anet, optimizer=replace(anet.optimizer, accumulate=2))
    batch = quantity("batch", twice, 4)
    assert (batch.unit, batch.start) == (8, 1)
    assert batch.apply(3).train.batch_size == 24
    assert batch.describe(3) == "24 videos a batch"


def test_size_scales_what_is_stored_with_what_is_seen(anet):
    size = quantity("size", anet, 1)
    assert (size.unit, size.start) == (32, 7)
    split = size.apply(14).train
    assert (split.augment.height, split.augment.width) == (448, 448)
    assert (split.loader.height, split.loader.width) == (512, 680)
    assert size.describe(14) == "448 x 448 pixels"
    assert size.apply(7) == anet


def test_stored_blocks_go_up_to_those_that_are_recomputed(anet):
    stored = quantity("stored_blocks", anet, 1)
    assert (stored.unit, stored.start, stored.most) == (1, 12, 12)
    assert stored.apply(3).backbone["stored_blocks"] == 3
    assert stored.describe(3) == "3 stored blocks"
    slowfast = read_settings(read_config_file(CONFIGS / "anet_slowfast101.py"))
    assert quantity("stored_blocks", slowfast, 1).most == 2 + 3 + 22 + 2  # of the fast pathway
    for config in (replace(anet, backbone={**anet.backbone, "rewired": False}), features()):
        with pytest.raises(ConfigError, match="no reversible backbone, nothing is recomputed"):
            quantity("stored_blocks", config, 1)


@pytest.mark.parametrize(("limit", "largest", "programs"), [(300, 12, 1), (160, 7, 4), (89, 0, 4)])
def test_a_search_ends_at_the_most_there_are(limit, largest, programs):
    found, compiled = search(lambda n: 90 + 10 * n, limit, 12, most=12)
    assert found.largest == largest
    assert compiled <= programs


@pytest.mark.usefixtures("compiled_once")
def test_inspect_finds_the_batch_that_fits_and_shows_what_it_compiled(tmp_path, config, monkeypatch, caplog):
    """On a device that holds the program of two videos, and half of what a third adds."""
    config = changed(config, mesh__data=1, mesh__fsdp=1, train__batch_size=1)
    settings = read_settings(config)
    module = importlib.import_module("re2tal_jax.modes.inspect")  # the package's attribute is the function
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)
    mesh = make_mesh(settings.mesh, one)

    def needed(batch):
        of_batch = replace(settings, train=replace(settings.train, batch_size=batch))
        return module.step_plan(of_batch, mesh, draw_blueprint(of_batch, mesh)).needed

    memory = int((needed(2) + needed(3)) / 2 / (1 - MARGIN))
    monkeypatch.setattr(module, "memory_of", lambda mesh: memory)
    caplog.set_level("INFO")
    report = module.inspect(settings, config, tmp_path / "run", fit="batch")
    rows = report.splitlines()
    assert rows[0].startswith("95 % of a device's memory, ")
    assert rows[-1] == "the largest that fits: 2 videos a batch"
    told = {int(row.split()[0]): "does not fit" not in row for row in rows[1:-1]}
    assert told[2]
    assert not told[3]
    assert all(fits == (batch <= 2) for batch, fits in told.items())
    assert rows[-1] in caplog.text
    assert "  2 videos a batch: compiling the step\n" in caplog.text  # before it takes its minutes
    assert not (tmp_path / "run").exists()


def test_inspect_compiles_for_accelerators_that_are_not_there(tmp_path, config, caplog):
    """Four chips share the batch; nothing of this machine's devices is asked."""
    if not is_available("v5e"):
        pytest.skip("no compiler for v5e: pip install '.[aot]'")
    config = changed(config, mesh__data=-1, mesh__fsdp=1, backbone__depths=(1,), localizer__arch=(0, 0, 1))
    module = importlib.import_module("re2tal_jax.modes.inspect")
    caplog.set_level("INFO")
    report = module.inspect(read_settings(config), config, tmp_path / "run", target="v5e:2x2")
    assert "compiling the reversible step for v5e:2x2: this takes some minutes" in caplog.text
    assert "devices: 4 x TPU v5 lite in 1 process(es), mesh data 4 x fsdp 1" in report
    assert re.search(r"\n  reversible +[\d.,]+ MiB per device \(arguments .*\); compiled in \d+ s\n", report)
    assert re.search(r"\n +fits: \d+\.\d % of the 16,128\.0 MiB of a device\n", report)  # 15.75 GiB
    assert len(re.findall(r"^ +[\d.,]+ MiB  ", report, re.MULTILINE)) == 5
    assert not (tmp_path / "run").exists()
