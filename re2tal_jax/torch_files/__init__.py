"""Files that PyTorch writes, read safely and without torch: tensors and plain Python values.

Reading never imports or calls what a file names; what it holds beside these is listed by name (`Source.placeholders`).
"""

from re2tal_jax.torch_files.files import Source, read
from re2tal_jax.torch_files.pickle_names import Placeholder
from re2tal_jax.torch_files.tensors import Tensor
from re2tal_jax.torch_files.unpickle import RunsCodeError

__all__ = ["Placeholder", "RunsCodeError", "Source", "Tensor", "read"]
