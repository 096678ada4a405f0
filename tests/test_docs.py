"""README, CONTRIBUTING and docs say what is: their links, names, keys, commands, snippets, tables and figure."""

import dataclasses
import importlib.util
import inspect
import json
import re
import runpy
import shlex
import typing
import xml.etree.ElementTree
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from re2tal_jax import backbones, data, localizers, main
from re2tal_jax.config import read_config_file
from re2tal_jax.data.features import FeatureConfig
from re2tal_jax.data.sampling import POLICIES
from re2tal_jax.modes.inspect import flat
from re2tal_jax.settings import Settings, read_settings
from re2tal_jax.training.optim import recipe_rules
from tests.test_architecture import LAYERS

ROOT = Path(main.__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
FOLDERS = ("re2tal_jax", "checkpoints_convert", "configs", "benchmarks", "tests", "docs")
MODULES = {name for layer in LAYERS for name in layer} - {"config"}  # keys of a config begin so
PLACES: dict[str, list[Any]] = {  # sections of a config whose keys are the arguments of factories
    "data": list(data.DATASETS.values()),
    "data.features": [FeatureConfig],
    "train.policy": list(POLICIES.values()),
    "eval.policy": list(POLICIES.values()),
    "backbone": list(backbones.BACKBONES.values()),
    "localizer": list(localizers.LOCALIZERS.values()),
    "parameter_groups": [recipe_rules],
}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """The page without blocks of code."""
    return re.sub(r"^```.*?^```|^    .*?$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def code(page: Path) -> list[str]:
    """What stands between single backquotes."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_every_relative_link_resolves(page):
    text = re.sub(r"`[^`\n]+`", "", prose(page))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for target in targets:
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{target} leads nowhere"
        assert not anchor or anchor in anchors(there), f"{target}: no such heading"


@each_page
def test_every_python_snippet_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "snippet"}
    for number, text in enumerate(blocks(page, "python")):
        exec(compile(text, f"{page.name}, snippet {number}", "exec"), names)


def commands() -> Iterator[str]:
    """Every command line of the pages, without the folder of the virtual environment and comments."""
    for page in PAGES:
        lines = [line for language in ("sh", "") for block in blocks(page, language) for line in block.splitlines()]
        lines += re.findall(r"^    (\S.*)$", page.read_text(), re.MULTILINE) + code(page)
        for line in lines:
            line = line.partition("  #")[0].replace(".venv/bin/", "").strip()
            if line.startswith(("python ", "make ")):
                yield line


COMMANDS = sorted(set(commands()))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_what_exists(command, tmp_path, monkeypatch):
    program, *arguments = shlex.split(command)
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert [a for a in arguments if "=" not in a] in [[target] for target in targets]
        return
    if arguments[0] != "-m":
        assert (ROOT / arguments[0]).is_file()
        return
    assert importlib.util.find_spec(arguments[1]) is not None
    assert all((ROOT / argument).exists() for argument in arguments[2:] if argument.startswith("tests/"))
    if arguments[1] == "re2tal_jax.main" and "FILE" not in command:
        for folder in (tmp_path / a for a in arguments if re.fullmatch(r"runs/\w+", a)):  # of the config of that name
            folder.mkdir(parents=True, exist_ok=True)
            config = read_config_file((ROOT / "configs" / folder.name).with_suffix(".py"))
            (folder / "config.json").write_text(json.dumps(config))
        monkeypatch.chdir(tmp_path)
        read_settings(
            main.read_command([str(ROOT / a) if a.startswith("configs/") else a for a in arguments[2:]]).config
        )


def test_commands_are_found():
    assert "make demo" in COMMANDS
    assert "make test" in COMMANDS
    assert sum("re2tal_jax.main --config configs/" in command for command in COMMANDS) >= 2


def arguments_of(factory: Any) -> set[str]:
    while hasattr(factory, "func"):
        factory = factory.func
    return set(inspect.signature(factory.__init__ if inspect.isclass(factory) else factory).parameters) - {"self"}


def keys_of(kind: Any, prefix: str) -> Iterator[str]:
    """Yield every key that a data class of the settings has, with those of data classes inside it."""
    for field, hint in typing.get_type_hints(kind).items():
        yield f"{prefix}.{field}"
        for option in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(option):
                yield from keys_of(option, f"{prefix}.{field}")


@pytest.fixture(scope="module")
def keys() -> set[str]:
    known = set(keys_of(Settings, "config"))
    for section, factories in PLACES.items():
        known |= {f"config.{section}.{name}" for factory in factories for name in arguments_of(factory)}
    for path in CONFIGS:
        known |= {key for key, _ in flat(read_config_file(path))}
    return known


def test_every_config_file_can_be_read():
    for path in CONFIGS:
        read_settings(read_config_file(path))


@each_page
def test_every_config_key_named_exists(page, keys):
    named = set(re.findall(r"(?<![\w./])config(?:\.[a-z_0-9]+)+", page.read_text())) - {"config.json", "config.py"}
    named -= {"config.section.key"}
    assert not named - keys


@each_page
def test_every_file_named_exists(page):
    for text in code(page):
        path = text.split("::")[0].split(" ")[0]
        if path.split("/")[0] in FOLDERS and "/" in path and "NAME" not in path and "…" not in path:
            assert (ROOT / path).exists(), text


@each_page
def test_every_function_named_exists(page):
    """Names such as `reversible.step_back`, from a module of the package on, and `tests/test_x.py::test_y`."""
    for text in code(page):
        if "::" in text:
            path, name = text.split("::")
            assert f"def {name}(" in (ROOT / path).read_text(), text
            continue
        parts = text.split("(")[0].split(".")
        if len(parts) < 2 or parts[0] not in MODULES or parts[-1] == "py" or "/" in text:
            continue
        assert resolve(parts) is not None, text


def resolve(parts: list[str]) -> Any:
    """Import as much of a dotted name as is a module, and look the rest up in it."""
    places = [ROOT / "re2tal_jax" / Path(*parts[:n]) for n in range(len(parts) + 1)]
    length = max(n for n, place in enumerate(places) if place.is_dir() or place.with_suffix(".py").is_file())
    found: Any = importlib.import_module(".".join(["re2tal_jax", *parts[:length]]))
    for name in parts[length:]:
        found = getattr(found, name)
    return found


def test_every_module_is_described_in_architecture():
    text = (ROOT / "docs" / "architecture.md").read_text()
    listed = re.findall(r"^\| `([\w/]+\.py)` \|", text, re.MULTILINE)
    package = ROOT / "re2tal_jax"
    modules = {str(p.relative_to(package)) for p in package.rglob("*.py") if p.name != "__init__.py"}
    assert sorted(listed) == sorted(modules)


def test_layers_are_those_that_are_enforced():
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.partition("<!-- layers -->")[2].partition("<!-- end of layers -->")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert [tuple(re.findall(r"`(\w+)`", row)) for row in rows] == LAYERS


def test_tables_are_those_of_the_results():
    for path, wanted in tables.pages().items():
        assert path.read_text() == wanted, f"{path.name} is out of date: python -m benchmarks.tables"


def test_a_later_row_replaces_an_earlier_one_of_the_same_setting(tmp_path):
    path = tmp_path / "results.csv"
    header = "date,machine,versions,benchmark,setting,value,unit\n"
    path.write_text(header + "d,m,v,demo,seed 0,81.2,%\nd,m,v,demo,seed 1,83,%\nd,m,v,demo,seed 0,1500,%\n")
    rows = tables.read_rows(path)
    assert [(row["setting"], tables.figure(row)) for row in rows] == [("seed 1", "83 %"), ("seed 0", "1,500 %")]
    path.write_text(header + "d,m,v,demo,seed 0\n")
    with pytest.raises(ValueError, match="columns"):
        tables.read_rows(path)


def rows_of(*lines: str) -> list[tables.Row]:
    """Rows of the CSV, of a benchmark, a setting and a value each."""
    keys = ("date", "versions", "benchmark", "setting", "value")
    rows = [dict(zip(keys, line.split("|"), strict=True)) for line in lines]
    return [{**row, "machine": "m", "unit": "s", "line": str(number)} for number, row in enumerate(rows)]


TURNS = rows_of(
    "d|old|against PyTorch|here, 2 threads: gone, a|9",
    "d|v|against PyTorch|here, 2 threads: OpenTAD plain, a|1",
    "d|v|against PyTorch|here, 2 threads: OpenTAD plain, b|2000",
    "d|v|against PyTorch|here, 2 threads: ours (workspace 1, stored_blocks 2), b|3",
    "d|v|against PyTorch|here, 2 threads: ours (workspace 1, stored_blocks 2) / OpenTAD plain, c|4",
    "d|v|demo|seed 0|5",
    "e|v|demo|seed 1|6",
)


def test_measures_are_columns_and_times_and_places_tables_of_their_own():
    assert (
        tables.full_tables(TURNS)
        == """\
## against PyTorch

d, m, v:

| here, 2 threads | a | b |
|---|---:|---:|
| OpenTAD plain | 1 s | 2,000 s |
| ours (workspace 1, stored_blocks 2) |  | 3 s |

| here, 2 threads | c |
|---|---:|
| ours (workspace 1, stored_blocks 2) / OpenTAD plain | 4 s |

## demo

d, m, v:

| setting | result |
|---|---:|
| seed 0 | 5 s |

e, m, v:

| setting | result |
|---|---:|
| seed 1 | 6 s |"""
    )


def test_the_readme_shows_what_is_chosen_and_misses_nothing_silently():
    chosen = (
        tables.Table("Steps", ("against PyTorch",), ("b", "a"), only="^[^/]*$"),
        tables.Table("Besides", ("demo", "none"), only="0"),
    )
    assert (
        tables.readme_tables(TURNS, chosen)
        == """\
| Steps, here, 2 threads | b | a |
|---|---:|---:|
| OpenTAD plain | 2,000 s | 1 s |
| ours (workspace 1, stored_blocks 2) | 3 s |  |

| Besides | result |
|---|---:|
| demo: seed 0 | 5 s |"""
    )
    for lost in (tables.Table("Lost", ("demo",), only="seed 7"), tables.Table("Lost", ("against PyTorch",), ("d",))):
        with pytest.raises(ValueError, match="table 'Lost'"):
            tables.readme_tables(TURNS, (lost,))


def test_a_table_needs_its_markers():
    page = f"a\n{tables.BEGIN}\nold\n{tables.END}\nb"
    assert tables.between_markers(page, "new") == f"a\n{tables.BEGIN}\nnew\n{tables.END}\nb"
    with pytest.raises(ValueError, match="expected one"):
        tables.between_markers("no marker", "new")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_figure_is_what_its_script_draws(theme):
    script: Mapping[str, Any] = runpy.run_path(str(ROOT / "docs" / "figures" / "wiring.py"))
    assert (ROOT / "docs" / "figures" / f"wiring-{theme}.svg").read_text() == script["draw"](theme)


def test_the_figure_of_memory_shows_the_results():
    script: Mapping[str, Any] = runpy.run_path(str(ROOT / "docs" / "figures" / "memory.py"))
    drawn = xml.etree.ElementTree.parse(ROOT / "docs" / "figures" / "memory.svg")
    (said,) = (element.text for element in drawn.iter() if element.tag.endswith("}description"))
    assert said == script["describe"](), "docs/figures/memory.svg is out of date: python docs/figures/memory.py"
    shown = [len(axes.get_lines()) for axes in script["draw"]().axes]
    assert shown == [len(script["read_lines"](name)) for name in script["PANELS"]]
    assert min(shown) >= 2


def test_the_worked_examples_are_what_the_command_prints():
    script: Mapping[str, Any] = runpy.run_path(str(ROOT / "docs" / "conversion_examples.py"))
    text = (ROOT / "docs" / "conversion.md").read_text()
    assert text == script["page"](text), "docs/conversion.md is out of date: python docs/conversion_examples.py"


@each_page
def test_pages_name_no_machine(page):
    assert not re.search(r"(?<![\w.])/(home|root|work|tmp|opt|mnt)/", page.read_text())
