"""What `--mode` chooses from; each mode is a function (settings, resolved config, workdir)."""

from re2tal_jax.modes.evaluate import evaluate
from re2tal_jax.modes.extract import extract
from re2tal_jax.modes.inspect import inspect
from re2tal_jax.modes.predict import predict
from re2tal_jax.modes.train import train

MODES = {"train": train, "eval": evaluate, "inspect": inspect, "predict": predict, "extract": extract}
