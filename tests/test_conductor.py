"""benchmarks.conductor with stand-ins for the workers: the protocol, turns, and what goes on when one fails."""

from types import SimpleNamespace

import pytest

from benchmarks import conductor
from benchmarks.conductor import WorkerError, started, take_turns

pytest_plugins = "tests.worker_stand_in"


def test_commands_are_answered_and_what_libraries_print_is_no_answer(make_contestant, tmp_path):
    with started(make_contestant("one", ours=True), tmp_path) as worker:
        assert worker.ask("hello")["versions"] == {"torch": "1"}
        held = worker.ask("build", log="unused")
        assert 2**20 < held["rss"] <= held["peak"]


def test_an_error_of_a_worker_is_told_and_it_lives_on(make_contestant, tmp_path):
    with started(make_contestant("one", ours=True), tmp_path) as worker:
        worker.ask("build", fails=1, name="one", log=str(tmp_path / "order"))
        with pytest.raises(WorkerError, match="one: step failed with MemoryError: no room"):
            worker.ask("step")
        assert worker.ask("step")["seconds"] == 3.0


def test_a_dead_worker_is_told_with_its_last_words(make_contestant, tmp_path):
    with started(make_contestant("one", ours=True), tmp_path) as worker:
        worker.ask("build", dies=1)
        with pytest.raises(WorkerError, match=r"exit code 3 at the command step.\s+some last words"):
            worker.ask("step")


def test_turns_rotate_and_the_first_step_does_not_count(make_contestant, tmp_path):
    found = take_turns([make_contestant(name, ours=False) for name in "abc"], 2, tmp_path)
    assert (tmp_path / "order").read_text().split() == [*"abc", *"abc", *"bca"]
    assert [found[name].seconds for name in "abc"] == [[3.0, 4.5]] * 3
    assert found["a"].peak >= found["a"].start > 2**20
    assert found["a"].memory == found["a"].device_peak == 7


def test_a_contestant_that_fails_in_a_round_costs_nothing_of_the_others(make_contestant, tmp_path, capsys):
    found = take_turns([make_contestant("a", ours=False, dies=2), make_contestant("b", ours=True)], 2, tmp_path)
    assert list(found) == ["b"]
    assert found["b"].seconds == [3.0, 4.5]
    assert "left out   a: the process ended with exit code 3" in capsys.readouterr().out


def test_ctrl_c_ends_the_rounds_and_keeps_what_was_measured(make_contestant, tmp_path, monkeypatch, capsys):
    naps = iter([0.0, 0.0])

    def sleep(seconds: float) -> None:
        del seconds
        if next(naps, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(conductor, "time", SimpleNamespace(sleep=sleep))
    found = take_turns([make_contestant("a", ours=False), make_contestant("b", ours=True)], 9, tmp_path)
    assert {title: m.seconds for title, m in found.items()} == {"a": [3.0], "b": [3.0]}
    assert "interrupted after 1 complete rounds" in capsys.readouterr().out
