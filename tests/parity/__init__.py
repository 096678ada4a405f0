"""Replays golden files of the published implementation; `python -m tests.parity PATH …`."""
