"""benchmarks.agreement with stand-ins for the workers: what agrees, what is refused, what is left out."""

from collections.abc import Mapping

import numpy as np
import pytest

from benchmarks.agreement import BenchmarkError, compare_outputs
from benchmarks.conductor import Contestant

pytest_plugins = "tests.worker_stand_in"


def same_names(contestant: Contestant, arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    return arrays


def test_outputs_that_agree_are_told(make_contestant, tmp_path, capsys):
    pair = [make_contestant("theirs", ours=False), make_contestant("mine", ours=True, value=1.0 + 1e-6)]
    assert compare_outputs(pair, 4, tmp_path, same_names) == pair
    assert "features differ by 0.0e+00, of 1 gradients at most by 1.0e-06" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mine", "told"),
    [
        ({"value": 1.01}, "gradient a differs by 1.0e-02 of its largest value, allowed is 1e-03"),
        ({"value": float("nan")}, "gradient a differs by inf"),
        ({"more": {"features": [2.0, 2.1]}}, "features"),
        ({"more": {"gradient b": [1.0]}}, "1 are of one alone, such as gradient b"),
    ],
)
def test_outputs_that_differ_are_refused(make_contestant, tmp_path, mine, told):
    pair = [make_contestant("theirs", ours=False), make_contestant("mine", ours=True, **mine)]
    with pytest.raises(BenchmarkError, match=told):
        compare_outputs(pair, 4, tmp_path, same_names)


def test_only_the_same_network_is_compared(make_contestant, tmp_path, capsys):
    both = [
        make_contestant("theirs", ours=False, rewired=False),
        make_contestant("reversible", ours=False),
        make_contestant("mine", ours=True),
        make_contestant("mine plain", ours=True, rewired=False, value=2.0),
    ]
    with pytest.raises(BenchmarkError, match="mine plain and theirs compute different things"):
        compare_outputs(both, 4, tmp_path, same_names)
    assert compare_outputs(both[:3], 4, tmp_path, same_names) == both[:3]
    assert "unchecked  theirs" in capsys.readouterr().out


def test_a_contestant_that_cannot_run_is_left_out_and_none_left_is_an_error(make_contestant, tmp_path, capsys):
    theirs, mine = make_contestant("theirs", ours=False), make_contestant("mine", ours=True)
    broken = make_contestant("broken", ours=True, fails=1)
    assert compare_outputs([theirs, broken, mine], 4, tmp_path, same_names) == [theirs, mine]
    assert "left out   broken: step failed with MemoryError: no room" in capsys.readouterr().out
    with pytest.raises(BenchmarkError, match="None of ours could be run"):
        compare_outputs([theirs, broken], 4, tmp_path, same_names)
