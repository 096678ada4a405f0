"""Which branches of a chain are scanned together."""

import jax
import jax.numpy as jnp
import numpy as np

from re2tal_jax.runs import Run, find_runs, stack_run


def chain(pattern: str) -> list[dict]:
    """One branch a letter; letters differ in shape, so that equal letters are alike."""
    return [{letter: jnp.full(ord(letter) - ord("a") + 1, i, jnp.float32)} for i, letter in enumerate(pattern)]


def test_repeating_patterns_are_found_and_cover_the_chain():
    assert find_runs(chain("aaaa")) == [Run(0, 1, 4)]
    assert find_runs(chain("ambmambm")) == [Run(0, 4, 2)]
    assert find_runs(chain("amam")) == [Run(0, 2, 2)]
    assert find_runs(chain("abc")) == [Run(0, 1, 1), Run(1, 1, 1), Run(2, 1, 1)]
    assert find_runs(chain("xababab")) == [Run(0, 1, 1), Run(1, 2, 3)]
    assert find_runs(chain("abab" + "c" + "dd")) == [Run(0, 2, 2), Run(4, 1, 1), Run(5, 1, 2)]
    assert find_runs([]) == []


def test_same_shapes_of_another_dtype_are_not_alike():
    assert len(find_runs([jnp.zeros(2, jnp.float32), jnp.zeros(2, jnp.int32)])) == 2


def test_stacked_run_holds_every_copy_in_order():
    branches = chain("ambmambm")
    stacked = stack_run(branches, find_runs(branches)[0])
    assert [list(b) for b in stacked] == [["a"], ["m"], ["b"], ["m"]]
    np.testing.assert_array_equal(stacked[1]["m"][:, 0], [1, 5])
    np.testing.assert_array_equal(stacked[3]["m"][:, 0], [3, 7])


def test_a_run_of_one_copy_is_not_stacked():
    branches = chain("ab")
    (only,) = stack_run(branches, find_runs(branches)[1])
    assert jax.tree.leaves(only)[0].shape == (2,)
