"""Conversion of published PyTorch checkpoints: the only place that knows PyTorch's names and layouts."""
