"""Writes the dialects and the worked examples of conversion.md: python docs/conversion_examples.py

For each dialect a file is made with the keys and shapes of a published network, zeros in it, and converted; what the
command prints goes into the page.
"""

import contextlib
import io
import re
import tempfile
from pathlib import Path

import numpy as np

from checkpoints_convert import torch_io
from checkpoints_convert.__main__ import main
from checkpoints_convert.dialects import DIALECTS
from checkpoints_convert.dialects.dialect import Dialect
from checkpoints_convert.networks import Network
from checkpoints_convert.rules import to_state_dict
from re2tal_jax.backbones import list_backbones

PAGE = Path(__file__).parent / "conversion.md"
NETWORKS = {"video_swin": "video_swin_tiny", "slowfast": "slowfast_r50", "slowonly": "slowonly_r50", "vit": "vit_small"}
HEADS = {  # what such files hold beside the backbone
    "mmaction2": ("cls_head.fc_cls.weight", "cls_head.fc_cls.bias"),
    "re2tal": ("cls_head.fc_cls.weight", "cls_head.fc_cls.bias"),
    "swin_transformer": ("cls_head.fc_cls.weight", "cls_head.fc_cls.bias"),
    "torchvision": ("head.weight", "head.bias"),
    "swin2d": ("head.weight", "head.bias", "layers.0.blocks.1.attn_mask"),
    "pyslowfast": ("head.projection.weight", "head.projection.bias"),
    "pytorchvideo": ("blocks.6.proj.weight", "blocks.6.proj.bias"),
    "resnet2d": ("fc.weight", "fc.bias"),
    "videomae": ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"),
    "videomae_pretrain": ("encoder.norm.weight", "mask_token", "decoder.norm.weight"),
    "huggingface": ("fc_norm.weight", "fc_norm.bias", "classifier.weight", "classifier.bias"),
}


def state_dict(dialect: Dialect) -> dict[str, np.ndarray]:
    """Return zeros under the keys that a file of the dialect has."""
    name = NETWORKS[dialect.family]
    network = Network(name, {"backbone": {"name": name, **dialect.options}}, whole=False)
    params = {p: np.zeros(shape, np.float32) for p, shape in network.shapes.items() if p not in dialect.computed}
    result = to_state_dict(params, dialect.inside(dialect.prefixes[0]))
    result |= dict(dialect.constants(network.backbone, result.keys()))
    if dialect.inflate:
        result = {key: _flat(key, value, network) for key, value in result.items()}
    return result | {key: np.zeros(4, np.float32) for key in HEADS[dialect.name]}


def _flat(key: str, value: np.ndarray, network: Network) -> np.ndarray:
    """Return a kernel or table of a video network as one of an image network."""
    if value.ndim == 5:
        return value[:, :, 0]
    if key.endswith("relative_position_bias_table"):
        return value[: len(value) // (2 * network.backbone.window_size[0] - 1)]
    return value


def example(dialect: Dialect, folder: Path) -> str:
    """Return the command and what it prints."""
    source = folder / f"{dialect.family}_{dialect.name}.safetensors"
    torch_io.write(source, state_dict(dialect))
    command = [source.name, "--model", NETWORKS[dialect.family], "--out", f"checkpoints/{source.stem}"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.chdir(folder):
        code = main(command)
    source.unlink()
    if code:
        raise RuntimeError(f"{command} ended with {code}:\n{printed.getvalue()}")
    return f".venv/bin/python -m checkpoints_convert {' '.join(command)}\n\n{_short(printed.getvalue())}"


def refusal(folder: Path) -> str:
    """Return a command that ends in an error, and all that it prints: a SlowFast 4x16 for the network of 8x8."""
    dialect = next(d for d in DIALECTS if d.name == "pytorchvideo")
    network = Network("", {"backbone": {"name": "slowfast_r50", **dialect.options, "fusion_kernel": 5}}, whole=False)
    params = {path: np.zeros(shape, np.float32) for path, shape in network.shapes.items()}
    torch_io.write(folder / "SLOWFAST_4x16_R50.safetensors", to_state_dict(params, dialect.names))
    command = ["SLOWFAST_4x16_R50.safetensors", "--model", "slowfast_r50", "--out", "checkpoints/slowfast"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), contextlib.chdir(folder):
        code = main(command)
    if code != 1:
        raise RuntimeError(f"{command} was not refused:\n{printed.getvalue()}")
    return f".venv/bin/python -m checkpoints_convert {' '.join(command)}\n\n{_short(printed.getvalue())}"


def _short(text: str) -> str:
    """Return the output with digests cut, which nobody reads in a page."""
    return re.sub(r"(SHA-256 [0-9a-f]{8})[0-9a-f]{56}", r"\1…", text).rstrip()


def examples() -> str:
    """Return one block for each dialect."""
    blocks = []
    with tempfile.TemporaryDirectory() as folder:
        for dialect in DIALECTS:
            title = f"**{dialect.family}, `{dialect.name}`**: {dialect.about}."
            blocks.append(f"{title}\n\n```text\n{example(dialect, Path(folder))}\n```")
        blocks.append(f"**A refusal**: exit code 1.\n\n```text\n{refusal(Path(folder))}\n```")
    introduction = (
        "## One example for each dialect\n\nThe files of these examples have the keys and shapes of published ones and "
        "zeros as values."
    )
    return "\n\n".join([introduction, *blocks])


def table() -> str:
    """Return the dialects by network."""
    rows = ["| networks | dialect | whose files | |", "|---|---|---|---|"]
    for dialect in DIALECTS:
        names = ", ".join(f"`{name}`" for name in list_backbones() if name.startswith(dialect.family))
        rows.append(f"| {names} | `{dialect.name}` | {dialect.about} | {'inflated' if dialect.inflate else ''} |")
    return "\n".join(rows)


def page(text: str) -> str:
    """Return the page with both parts written anew."""
    for name, content in (("dialects", table()), ("examples", examples())):
        begin, end = f"<!-- {name}: written by python docs/conversion_examples.py -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{content}\n{end}{after}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
