"""OpenTAD's Swin backbones, run on command; started by `benchmarks.against_pytorch` under the user's interpreter.

It needs Python 3.8, PyTorch, numpy, mmaction2 and a checkout of OpenTAD, whose folder is its argument. The three modes:

    plain          mmaction2's SwinTransformer3D, which is OpenTAD's ordinary backbone
    checkpointed   the same with with_cp=True, as OpenTAD's configs of it have
    reversible     OpenTAD's SwinTransformer3D_inv with inv_mode custom_backprop

OpenTAD's module is loaded by its path: importing the package would import every detector with its compiled extensions.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import sys
import time
from typing import Any, Mapping  # noqa: UP035  as in benchmarks.worker

import numpy as np

from benchmarks.worker import host_memory, serve

PACKAGES = ("torch", "mmaction2", "mmcv", "mmcv-lite")
BACKBONE = "opentad/models/backbones/re2tal_swin.py"


class Theirs:
    """One backbone with its input; the public methods are commands."""

    def __init__(self, checkout: str):
        self.checkout = checkout

    def hello(self) -> dict[str, Any]:
        """Import everything; return versions, and the GPU's name or None."""
        import torch

        self._modules()
        versions = {"python": platform.python_version()}
        for name in PACKAGES:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return {"versions": versions, "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}

    def _modules(self) -> tuple[Any, Any]:
        """Return the modules of the ordinary and of the rewired backbone."""
        ordinary = importlib.import_module("mmaction.models.backbones.swin")
        spec = importlib.util.spec_from_file_location("opentad_re2tal_swin", f"{self.checkout}/{BACKBONE}")
        assert spec is not None
        assert spec.loader is not None
        rewired = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(rewired)
        return ordinary, rewired

    def build(
        self, mode: str, network: Mapping[str, Any], weights: str, video: str, device: str, threads: int
    ) -> dict[str, Any]:
        """Build a backbone with given weights; return the memory held before its first step.

        Args:
            mode: see the module's docstring.
            network: embed_dim, depths, num_heads, patch_size, window_size, mlp_ratio.
            weights: .npz of its whole state dict.
            video: .npy of its input (B, F, H, W, C), float32.
            device: cpu, in float32; or gpu, where steps are in bfloat16 by autocast.
            threads: of the processor.
        """
        import torch

        torch.set_num_threads(threads)
        ordinary, rewired = self._modules()
        shared = {key: network[key] for key in ("patch_size", "window_size", "mlp_ratio")}
        if mode == "reversible":
            sizes = {key: network[key] for key in ("embed_dim", "depths", "num_heads")}
            reverse = ["custom_backprop"] * len(network["depths"])
            model = rewired.SwinTransformer3D_inv(
                **sizes, **shared, patch_norm=True, drop_path_rate=0.0, inv_mode=reverse
            )
        else:
            sizes = {key: network[key] for key in ("depths", "num_heads")}
            model = ordinary.SwinTransformer3D(
                {"embed_dims": network["embed_dim"], **sizes},
                **shared,
                pretrained2d=False,
                drop_path_rate=0.0,
                with_cp=mode == "checkpointed",
                out_indices=(len(network["depths"]) - 1,),
            )
        with np.load(weights, allow_pickle=False) as arrays:
            model.load_state_dict({key: torch.from_numpy(arrays[key]) for key in arrays.files})
        self.gpu = device == "gpu"
        self.model = model.to("cuda" if self.gpu else "cpu")
        self.model.train()  # mmaction2's returns None
        clip = torch.from_numpy(np.load(video)).permute(0, 4, 1, 2, 3).contiguous()
        self.video = clip.to("cuda" if self.gpu else "cpu")
        return self.memory()

    def check(self, frames: int, out: str) -> dict[str, Any]:
        """Write features (B, T, h, w, D) and the gradient of every parameter, all float32, for the first frames."""
        import torch

        if self.gpu:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        features = self.model(self.video[:, :, :frames])
        (features**2).mean().backward()
        arrays = {"features": features.detach().permute(0, 2, 3, 4, 1).cpu().numpy()}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                arrays[f"gradient {name}"] = parameter.grad.cpu().numpy()
        np.savez(out, **arrays)
        return {}

    def step(self) -> dict[str, Any]:
        """Run forward and backward of mean(features**2) once; return the seconds it took."""
        import torch

        self._finish()
        start = time.perf_counter()
        self.model.zero_grad(set_to_none=True)
        if self.gpu:
            with torch.autocast("cuda", torch.bfloat16):
                features = self.model(self.video)
        else:
            features = self.model(self.video)
        (features.float() ** 2).mean().backward()
        self._finish()
        return {"seconds": time.perf_counter() - start}

    def _finish(self) -> None:
        import torch

        if self.gpu:
            torch.cuda.synchronize()

    def memory(self) -> dict[str, Any]:
        """Return the memory of the process, and the most of the GPU's that its arrays took."""
        import torch

        return {**host_memory(), **({"device_peak": torch.cuda.max_memory_allocated()} if self.gpu else {})}


if __name__ == "__main__":
    theirs = Theirs(sys.argv[1])
    serve({f.__name__: f for f in (theirs.hello, theirs.build, theirs.check, theirs.step, theirs.memory)})
