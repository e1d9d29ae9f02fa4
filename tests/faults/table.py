"""The fault matrix: each of its rows, what shows it, and how many of it there are."""

from __future__ import annotations

from dataclasses import dataclass

from tests.faults import cases
from tests.faults.cases import Case


@dataclass(frozen=True)
class Row:
    """One kind of fault.

    Attributes:
        name: of its cases here, `name:7`; empty: tests alone show it.
        fault: what happens.
        must: what it must lead to.
        case: makes one case.
        count: cases in `make faults`; a case of `kill` and `term` has three faults, one of `s3` as many as it meets.
        small: numbers of the cases in `make test`.
        tests: of the suite, which are run by both: each of its parameters is one.
    """

    name: str
    fault: str
    must: str
    case: Case | None = None
    count: int = 0
    small: tuple[int, ...] = ()
    tests: tuple[str, ...] = ()


FIND, SAVE, DISK, LOCK = (f"tests/checkpoint/test_{name}.py" for name in ("find", "save", "storage_faults", "lock"))
MIRROR, STORAGE = (f"tests/storage/test_{name}.py" for name in ("mirror", "faults"))
NOTICE, AGAIN, ON_S3 = (f"tests/e2e/test_{name}.py" for name in ("notice", "interruption", "storage"))
LOST, LAUNCHER = "tests/test_lost_ranks.py", "tests/test_launcher.py"

ROWS = (
    Row(
        "kill",
        "kill -9 of a machine or of one rank at random moments, and a disk lost after it",
        "the same end; what was done since the last save is repeated",
        cases.kill,
        count=38,
        small=(3,),
        tests=(
            f"{AGAIN}::test_a_killed_run_ends_exactly_as_if_it_had_not_been",
            f"{SAVE}::test_a_kill_in_the_middle_of_a_save_costs_that_save",
            f"{MIRROR}::test_a_process_killed_in_the_middle_leaves_all_or_nothing",
            f"{MIRROR}::test_a_download_that_is_killed_goes_on_with_what_is_missing",
        ),
    ),
    Row(
        "term",
        "SIGTERM at random moments: to the launcher, one rank, all ranks, twice",
        "75, and no step repeated",
        cases.term,
        count=38,
        small=(4,),
        tests=(
            f"{NOTICE}::test_a_run_told_to_stop_again_and_again_ends_as_if_it_had_not_been",
            f"{NOTICE}::test_the_node_that_was_told_leaves_first_and_the_other_holds",
            f"{LOST}::test_a_notice_ends_all_ranks_while_one_works_and_the_others_wait",
            f"{LAUNCHER}::test_a_stop_signal_reaches_every_rank_once",
        ),
    ),
    Row(
        "rank",
        "one rank of two stopped (SIGSTOP) or killed",
        "the other leaves within train.collective_timeout",
        cases.rank,
        count=10,
        tests=(
            f"{NOTICE}::test_a_rank_that_is_lost_ends_the_run_in_a_bounded_time_as_a_crash",
            f"{LOST}::test_a_lost_rank_is_not_waited_for_beyond_the_time_out",
            f"{LOST}::test_the_others_learn_of_a_crash_and_need_not_wait_for_the_time_out",
        ),
    ),
    Row(
        "world",
        "world size changed at resume: 1 to 2, 2 to 1, 2 to 3",
        "the same course within 1e-5",
        cases.world,
        count=6,
        small=(2,),
        tests=(
            f"{AGAIN}::test_a_run_killed_on_one_process_goes_on_on_two",
            f"{AGAIN}::test_a_run_told_to_stop_on_two_processes_saves_leaves_with_75_and_goes_on_on_one",
            "tests/trainers/test_world_size.py::test_a_resumed_run_is_the_straight_run",
        ),
    ),
    Row(
        "",
        "each file of a checkpoint truncated, bit-flipped, emptied, removed; on disk and in the mirror",
        "the next older one, and a warning; never step 0",
        tests=(
            f"{FIND}::test_a_damaged_one_is_set_aside_for_the_next_older",
            f"{FIND}::test_damage_is_never_the_reason_for_a_start_at_step_0",
            f"{FIND}::test_every_bit_of_a_manifest_counts",
            f"{MIRROR}::test_a_damaged_copy_gives_way_to_the_next_older",
        ),
    ),
    Row(
        "",
        "a full disk, a read-only one, permission denied",
        "training goes on, or ends with a reason; older checkpoints intact",
        tests=(
            f"{DISK}::test_training_goes_on_with_the_older_checkpoint",
            f"{DISK}::test_a_run_that_can_save_nothing_ends_with_its_reason",
        ),
    ),
    Row(
        "s3",
        "S3: 5xx, resets, lost and half answers, slow, black hole, wrong keys",
        "nothing lost, no hang beyond the bound",
        cases.s3,
        count=30,
        tests=(
            f"{ON_S3}::test_the_end_is_the_straight_runs",
            f"{ON_S3}::test_an_outage_at_the_start_ends_with_75_in_one_line",
            f"{ON_S3}::test_a_lost_disk_costs_nothing_but_the_download",
            f"{ON_S3}::test_a_result_that_was_cut_off_is_not_seen_and_not_lost",
            f"{MIRROR}::test_hundreds_of_faults_lose_nothing",
            f"{STORAGE}::test_each_fault_in_every_second_request_loses_nothing",
            f"{STORAGE}::test_traces_a_model_and_an_output_through_hundreds_of_faults",
            f"{STORAGE}::test_what_outlasts_all_attempts_ends_with_75",
            f"{STORAGE}::test_what_no_second_attempt_would_change_is_refused_at_once",
            f"{STORAGE}::test_a_line_that_is_dead_in_one_direction_is_left_within_the_bound",
        ),
    ),
    Row(
        "two",
        "two runs started on one checkpoint folder",
        "one wins, the other says who holds it: 64",
        cases.two,
        count=10,
        small=(0,),
        tests=(
            f"{LOCK}::test_the_second_run_says_who_holds_the_folder_and_leaves",
            f"{LOCK}::test_a_killed_holder_is_no_obstacle",
        ),
    ),
    Row(
        "clock",
        "after a kill: the clock set back by a day, files with new times",
        "order comes from the step",
        cases.clock,
        count=4,
        small=(0,),
        tests=(f"{FIND}::test_the_newest_is_by_step_and_not_by_time",),
    ),
)
