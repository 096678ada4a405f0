"""Swin backbones of OpenTAD and ours in turns; `python -m benchmarks.against_pytorch --opentad DIR [--out FILE.csv]`.

DIR is a checkout of github.com/sming256/OpenTAD, --python an interpreter with PyTorch, mmaction2 and mmcv or mmcv-lite.
OpenTAD's plain, checkpointed and reversible backbones and our plain and rewired ones get the same weights and the same
clip, batch 1. Before anything is timed, features and the gradients of all parameters are compared, plain with plain and
rewired with rewired. Then each lives in a process of its own and they take turns, step by step, one running at a time.
A step is forward and backward of mean(features**2), without drop path.

Where PyTorch and JAX both see a GPU, steps run there in bfloat16 (float32 states in ours), and its memory is told; else
on the processor in float32. Memory of a process counts from its birth, imports and parameters included; what ours
compiles is compiled before, in another process, and what reading it took is given back before steps are counted, as
training does (`training/host_memory.py`). Ctrl-C ends the rounds: what was measured is reported.
"""

import argparse
import io
import itertools
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.agreement import compare_outputs
from benchmarks.conductor import Contestant, Measured, WorkerError, started, take_turns
from benchmarks.opentad_worker import BACKBONE
from benchmarks.rows import Row, append_rows, commit
from checkpoints_convert.convert import export
from checkpoints_convert.networks import Network
from re2tal_jax.backbones import list_backbones
from re2tal_jax.errors import ConfigError, Re2TalError, did_you_mean

FAMILY = "video_swin"
MIB = 2**20
CHECK_FRAMES = 64
"""Outputs are compared on so many frames at most: in float32 a plain network needs twice the memory of its steps."""
PROVIDERS = {"mmaction": "mmaction2", "mmcv": "mmcv-lite", "cv2": "opencv-python-headless"}
"""Packages whose modules are called otherwise."""


# ---- What is told


def table(measured: Mapping[str, Measured]) -> str:
    """Return the figures of every contestant, for people."""
    width = max(map(len, measured))
    lines = [f"{'':{width}s}  fastest s  median s  peak RSS MiB  above start MiB  GPU peak MiB"]
    for title, m in measured.items():
        device = "-" if m.device_peak is None else f"{m.device_peak / MIB:,.0f}"
        lines.append(
            f"{title:{width}s}  {m.fastest:9.3f}  {m.median:8.3f}  {m.peak / MIB:12,.0f}  "
            f"{(m.peak - m.start) / MIB:15,.0f}  {device:>12s}"
        )
    return "\n".join(lines)


def ratios(contestants: Sequence[Contestant], measured: Mapping[str, Measured]) -> Iterator[tuple[str, float]]:
    """Yield (name, value): each of our rewired ones against all that are not, in steps, then in memory.

    Beside the fastest steps stand quotients of two steps of one round, which ran within half a minute of each other:
    their median and quartiles.
    """
    present = [c for c in contestants if c.title in measured]
    for ours in (c for c in present if c.ours and c.rewired):
        for other in (c for c in present if not (c.ours and c.rewired)):
            a, b = measured[ours.title], measured[other.title]
            yield f"{ours.title} / {other.title}, fastest step", a.fastest / b.fastest
            paired = [mine / theirs for mine, theirs in zip(a.seconds, b.seconds, strict=False)]
            quartiles = statistics.quantiles(paired, n=4, method="inclusive") if len(paired) > 1 else paired * 3
            for name, value in zip(("lower quartile", "median", "upper quartile"), quartiles, strict=True):
                yield f"{ours.title} / {other.title}, {name} of rounds", value
            yield f"{ours.title} / {other.title}, peak memory", a.memory / b.memory


def rows(where: str, contestants: Sequence[Contestant], measured: Mapping[str, Measured]) -> Iterator[Row]:
    """Yield the rows of the CSV; `where` is the setting that all have in common."""
    for title, m in measured.items():
        yield "against PyTorch", f"{where}: {title}, fastest step", m.fastest, "s"
        yield "against PyTorch", f"{where}: {title}, median step", m.median, "s"
        yield "against PyTorch", f"{where}: {title}, peak RSS", m.peak / MIB, "MiB"
        yield (
            "against PyTorch",
            f"{where}: {title}, peak RSS above that before the first step",
            (m.peak - m.start) / MIB,
            "MiB",
        )
        if m.device_peak is not None:
            yield "against PyTorch", f"{where}: {title}, peak of the GPU's memory", m.device_peak / MIB, "MiB"
    for name, value in ratios(contestants, measured):
        yield "against PyTorch", f"{where}: {name}", value, ""


# ---- Contestants of this benchmark


def random_parameters(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Return generic parameters by path, float32.

    Freshly drawn ones would not do: behind a norm of scale 1 and bias 0 the loss is 1 whatever is before it, and every
    gradient 0.
    """
    generator = np.random.default_rng(seed)
    result = {}
    for path, shape in shapes.items():
        noise = generator.normal(size=shape).astype(np.float32)
        if path.endswith(".kernel"):
            result[path] = noise / np.float32(np.sqrt(np.prod(shape[:-1])))
        else:
            result[path] = np.float32(0.1) * noise + np.float32(path.endswith(".scale"))
    return result


def sizes(backbone: Any) -> dict[str, Any]:
    """Return the sizes that OpenTAD's worker needs to build the same network."""
    block = backbone.stages[0].blocks[0]
    embed_dim, hidden = block.mlp.fc1.kernel.shape
    return {
        "embed_dim": embed_dim,
        "depths": list(backbone.depths),
        "num_heads": [stage.blocks[0].attn.num_heads for stage in backbone.stages],
        "patch_size": list(backbone.patch_embed.proj.patch_size),
        "window_size": list(backbone.window_size),
        "mlp_ratio": hidden / embed_dim,
    }


def their_names(network: Network, contestant: Contestant, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return parameters, or gradients, as OpenTAD's worker names and lays them out, constants left out."""
    state = _state_dict(network, params, rewired=contestant.rewired)
    return {key: value for key, value in state.items() if value.dtype.kind == "f"}


def _state_dict(network: Network, params: Mapping[str, np.ndarray], *, rewired: bool) -> dict[str, np.ndarray]:
    state = export(network, params, "re2tal" if rewired else "mmaction2")
    return {key.removeprefix("backbone."): value for key, value in state.items()}


def make_contestants(
    options: argparse.Namespace, network: Network, device: str, commands: Mapping[bool, tuple[str, ...]], folder: Path
) -> list[Contestant]:
    """Write weights and clip to `folder`, and return all contestants."""
    params = random_parameters(network.shapes)
    weights: dict[str, Mapping[str, Any]] = {
        "ours": params,
        "plain": _state_dict(network, params, rewired=False),
        "rewired": _state_dict(network, params, rewired=True),
    }
    for name, arrays in weights.items():
        np.savez(folder / f"{name}.npz", **arrays)
    shape = (1, options.frames, options.size, options.size, 3)
    np.save(folder / "clip.npy", np.random.default_rng(1).normal(size=shape).astype(np.float32))
    build = {"video": str(folder / "clip.npy"), "device": device, "threads": options.threads}
    environment = _environment(options, device, folder)
    result = [
        Contestant(
            f"OpenTAD {mode}",
            ours=False,
            rewired=rewired,
            command=commands[False],
            build={
                **build,
                "mode": mode,
                "network": sizes(network.backbone),
                "weights": str(folder / f"{'rewired' if rewired else 'plain'}.npz"),
            },
            environment=environment,
        )
        for mode, rewired in (("plain", False), ("checkpointed", False), ("reversible", True))
    ]
    varied = [[(name, n) for n in getattr(options, name)] or [None] for name in ("workspace", "stored_blocks")]
    choices = [[pair for pair in pairs if pair is not None] for pairs in itertools.product(*varied)]
    budgets = {
        f" ({', '.join(f'{name} {n}' for name, n in choice)})" if choice else "": dict(choice) for choice in choices
    }
    for mode in ("plain", "rewired"):
        # an ordinary network stores every block, and its budget bounds its patches alone: once will do
        for name, budget in list(budgets.items())[: 1 if mode == "plain" else None]:
            result.append(
                Contestant(
                    f"ours {mode}" + (name if mode == "rewired" else ""),
                    ours=True,
                    rewired=mode == "rewired",
                    command=commands[True],
                    build={
                        **build,
                        "mode": mode,
                        "network": {"name": options.model, **budget},
                        "weights": str(folder / "ours.npz"),
                    },
                    environment=environment,
                )
            )
    return result


def _environment(options: argparse.Namespace, device: str, folder: Path) -> dict[str, str]:
    """Return what the workers' libraries are told before they are imported."""
    result = {
        **{name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")},
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compile_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    if device == "cpu":
        result |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return result


def greet(commands: Mapping[bool, tuple[str, ...]], python: str, folder: Path) -> dict[bool, dict[str, Any]]:
    """Return what either side's worker says of versions and GPU.

    Raises:
        ConfigError: a package is missing under the user's interpreter, or cannot be imported.
    """
    answers = {}
    for ours, command in commands.items():
        with started(Contestant("ours" if ours else "OpenTAD", ours, False, command), folder) as worker:
            try:
                answers[ours] = worker.ask("hello")
            except WorkerError as error:
                if ours:
                    raise
                if not error.module:
                    raise ConfigError(f"OpenTAD's backbone cannot be imported by {python}. {error}") from error
                package = error.module.partition(".")[0]
                raise ConfigError(
                    f"{python} has no module {error.module}, which OpenTAD's backbone needs: install it there (pip "
                    f"install {PROVIDERS.get(package, package)}), or name another interpreter with --python."
                ) from error
    return answers


# ---- Command line


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the checked options, `opentad` and `python` as absolute paths.

    Raises:
        ConfigError: values that cannot be run.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--opentad", type=Path, required=True, metavar="DIR", help="a checkout of OpenTAD")
    parser.add_argument("--python", default=sys.executable, metavar="FILE", help="interpreter that can import mmaction")
    parser.add_argument("--model", default="video_swin_tiny", help="tiny, small, base or large")
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--size", type=int, default=112, help="height and width of the clip")
    parser.add_argument("--workspace", type=int, nargs="+", default=[], help="our budgets of a tile, each a contestant")
    parser.add_argument("--stored-blocks", type=int, nargs="+", default=[], help="our last blocks that store, the same")
    parser.add_argument("--threads", type=int, default=2, help="of the processor, for every contestant")
    parser.add_argument("--repeats", type=int, default=10, help="rounds")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="auto: a GPU both sides see")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="CSV that the rows are appended to")
    options = parser.parse_args(arguments)
    if not sys.platform.startswith("linux"):
        raise ConfigError(
            f"The benchmark runs on Linux alone, where processes tell their memory; this is {sys.platform}."
        )
    options.opentad = options.opentad.resolve()
    if not (options.opentad / BACKBONE).is_file():
        raise ConfigError(
            f"--opentad {options.opentad} has no {BACKBONE}: it is no checkout of OpenTAD. Make one with git clone "
            "https://github.com/sming256/OpenTAD."
        )
    if (found := shutil.which(options.python)) is None:
        raise ConfigError(f"--python {options.python} is no program that can be run: name a Python interpreter.")
    options.python = os.path.abspath(found)  # not resolved: a virtual environment is told by its link
    models = [name for name in list_backbones() if name.startswith(FAMILY)]
    if options.model not in models:
        raise ConfigError(f"--model {options.model} has no counterpart. {did_you_mean(options.model, models)}")
    for name in ("frames", "size", "threads", "repeats"):
        if (value := getattr(options, name)) < 1:
            raise ConfigError(f"--{name} {value}: allowed is 1 or more.")
    if any(budget < 1 for budget in options.workspace) or len(set(options.workspace)) < len(options.workspace):
        raise ConfigError(f"--workspace {options.workspace}: allowed are different numbers, 1 or more.")
    if any(n < 0 for n in options.stored_blocks) or len(set(options.stored_blocks)) < len(options.stored_blocks):
        raise ConfigError(f"--stored-blocks {options.stored_blocks}: allowed are different numbers, 0 or more.")
    if options.threads > (available := len(os.sched_getaffinity(0))):
        raise ConfigError(f"--threads {options.threads}: allowed are up to {available}, the cores of this process.")
    return options


def choose_device(wanted: str, gpus: Mapping[bool, str | None]) -> str:
    """Return cpu or gpu; `gpus` are the names that OpenTAD's side (False) and ours (True) see.

    Raises:
        ConfigError: a GPU is wanted that not both see.
    """
    told = f"PyTorch sees {gpus[False] or 'none'}, JAX sees {gpus[True] or 'none'}"
    both = None not in (gpus[False], gpus[True])
    if wanted == "gpu" and not both:
        raise ConfigError(f"--device gpu: {told}. Install both with support for it, or measure with --device cpu.")
    if wanted == "auto" and not both:
        print(f"No GPU for both ({told}): measured on the processor, without memory of a GPU.")
    return "gpu" if both and wanted != "cpu" else "cpu"


def run(options: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """Check, measure and print; return the rows and the versions of OpenTAD's side.

    Raises:
        Re2TalError: what cannot be run, and outputs that differ.
    """
    commands = {
        False: (options.python, "-m", "benchmarks.opentad_worker", str(options.opentad)),
        True: (sys.executable, "-m", "benchmarks.our_worker"),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        answers = greet(commands, options.python, folder)
        device = choose_device(options.device, {ours: answer["gpu"] for ours, answer in answers.items()})
        if device == "cpu":
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])  # workers inherit it
        versions = {k: v for k, v in answers[False]["versions"].items() if k != "python"}
        versions["OpenTAD"] = commit(options.opentad)
        place = f"float32, {options.threads} threads" if device == "cpu" else f"bfloat16, {answers[True]['gpu']}"
        where = f"{options.model}, {options.frames} frames at {options.size} x {options.size}, {place}"
        print(f"{where}\nOpenTAD's side: {', '.join(f'{k} {v}' for k, v in answers[False]['versions'].items())}")
        network = Network(options.model, {"backbone": {"name": options.model}}, whole=False)
        contestants = make_contestants(options, network, device, commands, folder)
        contestants = compare_outputs(
            contestants,
            min(options.frames, CHECK_FRAMES),
            folder,
            lambda contestant, params: their_names(network, contestant, params),
        )
        measured = take_turns(contestants, options.repeats, folder)
    print(table(measured))
    for text, value in ratios(contestants, measured):
        print(f"{value:6.3f}  {text}")
    return list(rows(where, contestants, measured)), versions


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures and append them to --out."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # progress is seen in a file too
    try:
        options = read_options(arguments)
        jax.config.update("jax_platforms", "cpu")  # this process only draws weights; a GPU is for the workers
        found, versions = run(options)
    except Re2TalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.out is not None:
        append_rows(options.out, found, packages=("jax", "jaxlib", "flax"), cores=options.threads, others=versions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
