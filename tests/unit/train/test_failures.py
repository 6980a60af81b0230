"""Which failures of workers end a run, and what is said about them."""

from __future__ import annotations

import pickle

from eagleray.errors import NonFiniteLossError, PeersLostError, RunFailedError, WorkerError
from eagleray_jobs.train.failures import RankFailure, find_fatal, merge
from eagleray_jobs.train.whereabouts import RanksMissingError, Whereabouts


class Stubborn(Exception):
    def __reduce__(self) -> str:
        raise TypeError("cannot be pickled")


def raised(rank: int, error: BaseException) -> RankFailure:
    try:
        raise error
    except BaseException as caught:
        return RankFailure.of(rank, caught)


def lost_peer(rank: int) -> RankFailure:
    return raised(
        rank, RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3141")
    )


def test_a_rank_that_raises_for_a_reason_of_its_own_is_fatal() -> None:
    assert find_fatal([lost_peer(0), raised(1, ValueError("bad"))])


def test_ranks_that_only_lost_a_peer_are_worth_a_restart() -> None:
    assert not find_fatal([lost_peer(0), lost_peer(2)])
    assert not find_fatal([])


def test_an_error_of_ours_keeps_its_class_message_and_hint() -> None:
    error = merge([raised(0, NonFiniteLossError("loss is nan at step 7", "lower it")), lost_peer(1)])
    assert type(error) is NonFiniteLossError
    assert (error.message, error.hint) == ("loss is nan at step 7", "lower it")


def test_equal_errors_become_one_message_with_a_list_of_ranks_and_one_traceback() -> None:
    error = merge([raised(rank, ValueError("bad row")) for rank in (2, 0, 1)])
    assert isinstance(error, WorkerError)
    assert error.message.startswith("ranks 0, 1, 2 raised ValueError: bad row\nTraceback")
    assert error.message.count("Traceback") == 1


def test_the_rank_that_raised_comes_first_and_those_that_waited_are_named_as_such() -> None:
    text = str(merge([lost_peer(0), raised(1, KeyError("column")), lost_peer(2)]))
    assert text.startswith("rank 1 raised KeyError: 'column'")
    assert text.endswith("ranks 0, 2 only waited and lost the connection")
    assert "gloo" not in text


def test_a_death_names_the_rank_that_died_and_those_that_noticed() -> None:
    error = merge([lost_peer(0)], dead=[1])
    assert error.message == "the process of rank 1 died; rank 0 noticed"
    assert isinstance(error, RunFailedError)


def test_a_rank_that_did_not_come_is_named_with_where_all_of_them_were() -> None:
    here = Whereabouts(0, "step 7", "all_reduce 3 of group tp [0, 1, 2]", waits=True, line="loop.py:9 in run")
    there, silent = Whereabouts(1, "step 7", None, line="task.py:5 in loss"), Whereabouts(2, None)
    few = raised(0, RanksMissingError("timed out", (here,)))
    full = raised(3, RanksMissingError("timed out", (here, there, silent)))
    assert few.lost_peer and not find_fatal([few, full])
    error = merge([few, full])
    assert error.message.split("\n") == [
        "ranks 1, 2 did not come to a collective in which ranks 0, 3 waited",
        "  rank 0: step 7, all_reduce 3 of group tp [0, 1, 2] (waiting), at loop.py:9 in run",
        "  rank 1: step 7, at task.py:5 in loss",
        "  rank 2: gave no sign of life",
    ]
    assert error.hint is not None and "train.ddp_timeout" in error.hint
    assert merge([full], dead=[1]).message == "the process of rank 1 died; rank 3 noticed"


def test_a_rank_that_still_waits_is_none_that_did_not_come() -> None:
    ends = "all_reduce 3 of group tp"
    waiting = tuple(Whereabouts(rank, "step 7", ends, waits=True) for rank in (0, 1))
    hanging = Whereabouts(2, "step 7", ends, line="task.py:5 in loss")
    error = merge([raised(0, RanksMissingError("timed out", (*waiting, hanging)))])
    assert error.message.split("\n") == [
        "rank 2 did not come to a collective in which ranks 0, 1 waited",
        "  rank 0: step 7, all_reduce 3 of group tp (waiting)",
        "  rank 1: step 7, all_reduce 3 of group tp (waiting)",
        "  rank 2: step 7, all_reduce 3 of group tp (done), at task.py:5 in loss",
    ]


def test_ranks_that_wait_for_each_other_are_told_to_call_the_same() -> None:
    waiting = (
        Whereabouts(0, "step 7", "broadcast 4 of group dp", waits=True),
        Whereabouts(1, "step 7", "all_reduce 4 of group dp", waits=True),
    )
    error = merge([raised(0, RanksMissingError("timed out", waiting))])
    assert error.message.startswith(
        "ranks 0, 1 waited for each other, each in another collective\n  rank 0: step 7"
    )
    assert error.hint is not None and "the same order" in error.hint


def test_ranks_that_lost_others_in_a_save_only_waited() -> None:
    assert not find_fatal([raised(0, PeersLostError("a rank did not take part in the save"))])


def test_a_pipeline_that_wraps_the_loss_of_a_rank_only_waited() -> None:
    try:
        try:
            raise RuntimeError("gloo: Timed out waiting 8000ms for recv operation to complete")
        except RuntimeError as lost:
            raise RuntimeError("[Stage 0] failed to run forward") from lost
    except RuntimeError as error:
        assert RankFailure.of(0, error).lost_peer
    assert not raised(0, RuntimeError("[Stage 0] failed to run forward")).lost_peer


def test_a_failure_survives_pickling_whatever_was_raised() -> None:
    failure = raised(3, Stubborn("odd"))
    assert pickle.loads(pickle.dumps(failure)) == failure
    assert failure.kind == "Stubborn"
    assert "raise error" in failure.traceback
