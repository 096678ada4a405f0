"""Fixtures of the system tests (a plugin); see `tests.system`."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from re2tal_jax.main import main
from tests.system import (
    STEPS,
    Done,
    changed,
    command,
    once,
    run_process,
    tiny_config,
    write_config,
    write_data,
)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """Folder with `annotations.json` and `videos/`; not to be changed."""
    return once(tmp_path_factory, "tiny_data", write_data)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> Path:
    """Where compiled programs are kept during a session."""
    return once(tmp_path_factory, "compiled", Path.mkdir)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, tiny_data, compiled) -> Path:
    """A whole run of 20 steps in a process of its own, logging what is compiled: workdir `run`, `done.json`."""

    def make(folder: Path) -> None:
        folder.mkdir()
        write_config(folder / "tiny.py", tiny_config(tiny_data))
        arguments = command("--config", folder / "tiny.py", "--workdir", folder / "run")
        done = run_process(arguments, JAX_COMPILATION_CACHE_DIR=str(compiled), JAX_LOG_COMPILES="1")
        (folder / "done.json").write_text(json.dumps(vars(done)))

    return once(tmp_path_factory, "run_folder", make)


@pytest.fixture(scope="session")
def finished(run_folder) -> Done:
    result = Done(**json.loads((run_folder / "done.json").read_text()))
    assert result.code == 0, result.err
    return result


@pytest.fixture(scope="session")
def config(tiny_data):
    """The tiny config: STEPS steps on a mesh of 4 x 2 devices."""
    loop = {"stop": {"steps": STEPS}, "evaluate_every": {"steps": 100}, "checkpoint_every": {"steps": 2}}
    sharded = tiny_config(tiny_data, data_devices=4, fsdp_devices=2)
    return changed(sharded, loop=loop | {"log_every_steps": 1})


@pytest.fixture(scope="module")
def compiled_once(compiled) -> Iterator[None]:
    """Compile each program once in this session, whichever process asks for it."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(compiled))
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


@pytest.fixture
def run_main(capsys) -> Iterator[Callable[..., Done]]:
    """Call the command line in this process; logging is put back afterwards."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in ("jax", "absl")}

    def run(*arguments: Any) -> Done:
        capsys.readouterr()
        code = main(list(map(str, arguments)))
        return Done(code, *capsys.readouterr())

    yield run
    root.handlers[:], root.level = before[0], before[1]
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
