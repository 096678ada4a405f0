"""Videos encoded again so that training reads them quickly; `python -m re2tal_jax.data.prepare` is the command."""

from re2tal_jax.data.prepare.encode import Encoding
from re2tal_jax.data.prepare.jobs import Result, prepare

__all__ = ["Encoding", "Result", "prepare"]
