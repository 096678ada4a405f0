"""A data set looked at before training; `python -m re2tal_jax.data.check` is the command."""

from re2tal_jax.data.check.problems import Problem
from re2tal_jax.data.check.report import Report
from re2tal_jax.data.check.run import check

__all__ = ["Problem", "Report", "check"]
