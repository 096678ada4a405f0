"""A file imports only from its own layer or a lower one (docs/architecture.md)."""

import ast
from pathlib import Path

import pytest

import re2tal_jax

ROOT = Path(re2tal_jax.__file__).parent
LAYERS = [
    (
        *("types", "registry", "config", "command", "errors", "segments", "accelerators", "seeds"),
        *("activitynet_format", "weights", "progress", "locks", "torch_files"),
    ),
    ("exact", "kept", "tiling", "branch", "runs", "chunks", "frames", "stored", "reversible", "diagnostics"),
    ("backbones", "targets", "losses"),
    ("localizers", "detector"),
    ("nms", "external_classifier", "postprocess", "matching", "evaluation"),
    ("data",),
    ("training", "inference"),
    ("settings",),
    ("experiment", "trained"),
    ("modes",),
    ("main", "__init__"),
]
LAYER = {name: level for level, names in enumerate(LAYERS) for name in names}


def part(path: Path) -> str:
    """The module or folder directly below the package that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("re2tal_jax.")}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_from_its_own_or_a_lower_layer(path):
    assert part(path) in LAYER, f"{part(path)} has no layer yet: add it to LAYERS here and to docs/architecture.md"
    above = {name for name in imports(path) if name in LAYER and LAYER[name] > LAYER[part(path)]}
    assert not above, f"{path.relative_to(ROOT)} imports from a higher layer: {', '.join(sorted(above))}"


def test_the_package_never_imports_its_tools_or_tests():
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(
                m.split(".")[0] in ("tests", "benchmarks", "configs", "checkpoints_convert") for m in modules
            ), path
