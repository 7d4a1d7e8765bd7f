"""``trainer/rollcall.py``: what ranks' records say when they are laid side by side."""

from dataclasses import replace
from typing import Any

from trainer import exits
from trainer.rollcall import Record, judge, missing

ONE = Record(0, 4, "node1", 0, 2, "cpu", "eth0", "10.0.0.1", {"torch": "2.13.0"}, None, exits.WRONG)


def records(**changes: dict[str, Any]) -> list[Record]:
    """Two hosts with two ranks each; ``rank3={...}`` changes one."""
    places = [("node1", 0), ("node1", 1), ("node2", 0), ("node2", 1)]
    made = [
        replace(ONE, rank=rank, host=host, local_rank=local, address=f"10.0.0.{host[-1]}")
        for rank, (host, local) in enumerate(places)
    ]
    return [replace(record, **changes.get(f"rank{record.rank}", {})) for record in made]


def test_equal_ranks_may_go_on():
    verdict = judge(records())
    assert (verdict.code, verdict.message, verdict.outside) == (exits.DONE, "", "10.0.0.1")
    assert verdict.table == ("  node1 (ranks 0-1): eth0 10.0.0.1\n  node2 (ranks 2-3): eth0 10.0.0.2")


def test_an_address_that_others_reach_is_found_behind_loopback_addresses():
    loopback = {"address": "127.0.1.1"}
    assert judge(records(rank0=loopback, rank1=loopback)).outside == "10.0.0.2"
    every = {f"rank{rank}": loopback for rank in range(4)}
    assert judge(records(**every)).outside == ""


def test_facts_that_differ_are_named_by_host():
    other = {"facts": {"torch": "2.12.0", "corpus": "abc"}}
    verdict = judge(records(rank2=other, rank3=other))
    assert verdict.code == exits.WRONG
    assert "\n  - torch: node1 2.13.0; node2 2.12.0\n  - corpus: node1 none; node2 abc\n" in verdict.message


def test_devices_that_differ_are_named():
    assert (
        "- device: node1 cpu; node2 cuda\n"
        in judge(records(rank2={"device": "cuda"}, rank3={"device": "cuda"})).message
    )


def test_hundreds_of_differences_and_hosts_are_cut_short():
    many = [
        replace(
            ONE,
            rank=rank,
            size=40,
            host=f"node{rank}",
            local_size=1,
            facts={f"f{i}": str(rank) for i in range(30)},
        )
        for rank in range(40)
    ]
    message = judge(many).message
    assert len(message.splitlines()) == 15 and "and 18 more" in message
    split = judge([replace(record, facts={"corpus": str(record.rank // 20)}) for record in many]).message
    assert "node11, and 8 more 0; node20" in split


def test_ranks_per_host_that_do_not_add_up():
    """node2 was started with one rank of two, and two ranks are the first of their host."""
    verdict = judge(records(rank3={"local_rank": 0}))
    assert verdict.code == exits.WRONG
    assert "of hosts with 2 ranks, local ranks 0 to 1 came 3, 1 times" in verdict.message


def test_hosts_of_different_sizes_add_up():
    alone = {"local_size": 1, "local_rank": 0}
    assert judge(records(rank2=alone, rank3={**alone, "host": "node3"})).code == exits.DONE


def test_a_problem_of_all_is_told_as_it_is():
    every = {f"rank{rank}": {"problem": "lr=-1 is negative"} for rank in range(4)}
    verdict = judge(records(**every))
    assert (verdict.code, verdict.message) == (exits.WRONG, "lr=-1 is negative")


def test_a_problem_of_some_is_told_with_its_hosts():
    problem = {"problem": "no such corpus", "code": exits.FAILED}
    verdict = judge(records(rank2=problem, rank3=problem, rank0={"facts": {}}))
    assert (verdict.code, verdict.message) == (exits.FAILED, "no such corpus\n  (met by node2 (ranks 2-3))")
    verdict = judge(records(rank2=problem, rank1={"problem": "lr=-1"}))
    assert verdict.code == exits.WRONG  # to be corrected, whatever else there is
    assert "lr=-1\n  (met by node1 (rank 1))" in verdict.message and "node2 (rank 2)" in verdict.message


def test_missing_ranks_are_named_and_who_is_there():
    verdict = missing([replace(ONE, size=8, rank=rank) for rank in (0, 1, 4)], 30.0)
    assert verdict.code == exits.LOST
    assert "3 of 8 ranks came within timeouts.start_s=30 s; missing: ranks 2-3, 5-7" in verdict.message
    assert "node1 (ranks 0-1, 4): eth0 10.0.0.1" in verdict.message
