"""Compiled programs are kept in the run's folder: the second run reads what the first compiled, and says so."""

import re

import jax
import pytest

from re2tal_jax.training.compile_cache import FOLDER, compile_cache
from tests.training_stand_in import make_parts, make_run


@pytest.fixture
def no_cache():
    """Whatever the environment says, no folder is chosen."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def told(caplog):
    return re.search(r"train step: (.*) in \d+\.\d s, plans .* MiB per device", caplog.text)[1]


def test_a_second_run_takes_its_step_from_the_cache(tmp_path, no_cache, caplog):
    caplog.set_level("INFO")
    for attempt, how in (("first", "compiled"), ("second", "from the cache")):
        caplog.clear()
        jax.clear_caches()  # as in another process
        with compile_cache(tmp_path / "run") as folder:
            make_run(tmp_path / attempt, make_parts(), stop=1).run()
        assert told(caplog) == how
    assert folder == tmp_path / "run" / FOLDER
    assert any(path.name.startswith("jit_train_step") for path in folder.iterdir())
    assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_that_was_chosen_before_is_used_instead(tmp_path, no_cache):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "chosen"))
    with compile_cache(tmp_path / "run") as folder:
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "chosen")
    assert folder == tmp_path / "chosen"
    assert not (tmp_path / "run").exists()
