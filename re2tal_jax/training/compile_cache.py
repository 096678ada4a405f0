"""Compiled programs kept on disk: a second run of the same config starts without compiling."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

FOLDER = "compile_cache"
# Also what compiles quickly is kept, but not the hundreds of programs of a single operation.
_SETTINGS = {"jax_persistent_cache_min_compile_time_secs": 0.1, "jax_persistent_cache_min_entry_size_bytes": 0}


@contextlib.contextmanager
def compile_cache(workdir: Path) -> Iterator[Path]:
    """Keep what is compiled inside the context in the run's folder, and yield where.

    A folder that was chosen before, by JAX_COMPILATION_CACHE_DIR or `jax.config`, is left as it is.
    """
    wanted = _SETTINGS | {"jax_compilation_cache_dir": str(workdir / FOLDER)}
    before = {name: getattr(jax.config, name) for name in wanted}
    if chosen := before["jax_compilation_cache_dir"]:
        yield Path(chosen)
        return
    for name, value in wanted.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX looks at its settings once, when it first compiles
    try:
        yield workdir / FOLDER
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def cache_hits() -> Iterator[list[str]]:
    """Yield a list that has an entry for every program which is read from disk instead of compiled."""
    hits: list[str] = []

    def note(event: str, **_: object) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    jax.monitoring.register_event_listener(note)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(note)
