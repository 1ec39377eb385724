"""What may be deleted from a level, decided from its listing."""

from hypothesis import given
from hypothesis import strategies as st

from resilient.checkpoint.agent.retention import durable_deletions, local_deletions
from resilient.checkpoint.names import complete_steps, image_name, record_name, step_of


def files(step: int, ranks: list[int], world_size: int, images_only: bool = False) -> list[str]:
    images = [image_name(step, rank, world_size) for rank in ranks]
    return images if images_only else images + [record_name(step, rank, world_size) for rank in ranks]


def steps_of(names: tuple[str, ...]) -> set[int]:
    return {step for name in names if (step := step_of(name)) is not None}


def test_the_last_ones_and_each_nth_stay_at_the_durable_level() -> None:
    names = [name for step in range(100, 700, 100) for name in files(step, [0, 1], 2)]
    deletions = durable_deletions(names, upto=600, keep_last=2, keep_every=300)
    assert steps_of(deletions.records) == steps_of(deletions.images) == {100, 200, 400}


def test_records_go_before_images_and_the_catalog_goes_with_the_images() -> None:
    names = [*files(1, [0], 1), "step_00000001/catalog.json", *files(2, [0], 1)]
    deletions = durable_deletions(names, upto=2, keep_last=1, keep_every=None)
    assert deletions.records == (record_name(1, 0, 1),)
    assert set(deletions.images) == {image_name(1, 0, 1), "step_00000001/catalog.json"}


def test_an_incomplete_step_stays_until_two_newer_ones_are_complete() -> None:
    torn = files(1, [0], 2)
    one_newer = torn + files(2, [0, 1], 2)
    assert durable_deletions(one_newer, upto=2, keep_last=3, keep_every=None).records == ()
    two_newer = one_newer + files(3, [0, 1], 2)
    deletions = durable_deletions(two_newer, upto=3, keep_last=3, keep_every=None)
    assert steps_of(deletions.records) == steps_of(deletions.images) == {1}


def test_what_is_newer_than_the_step_that_was_completed_is_not_touched() -> None:
    names = [name for step in (1, 2, 3, 10, 11) for name in files(step, [0], 1)]
    deletions = durable_deletions(names, upto=3, keep_last=1, keep_every=None)
    assert steps_of(deletions.records) == {1, 2}


def test_names_of_others_are_never_named() -> None:
    foreign = ["claim.json", "notes.txt", "step_00000001/model.pt", "step_00000001/sub/rank_00000-of-00001.json"]
    names = [*foreign, *files(1, [0], 1), *files(2, [0], 1)]
    deletions = durable_deletions(names, upto=2, keep_last=1, keep_every=None)
    assert not set(foreign) & {*deletions.records, *deletions.images}


def test_at_the_local_level_only_files_of_this_nodes_ranks_go() -> None:
    names = [name for step in (1, 2, 3) for name in files(step, [0, 1, 2, 3], 4)]
    deletions = local_deletions(names, upto=3, ranks={0, 1}, complete={1, 2, 3}, keep_last=2, uploading=set())
    assert set(deletions.records) == {record_name(1, 0, 4), record_name(1, 1, 4)}


def test_a_local_step_that_is_still_being_uploaded_stays() -> None:
    names = [name for step in (1, 2, 3) for name in files(step, [0], 1)]
    deletions = local_deletions(names, upto=3, ranks={0}, complete={1, 2, 3}, keep_last=1, uploading={1})
    assert steps_of(deletions.records) == {2}


def test_local_steps_of_an_earlier_agent_stay_until_two_newer_ones_are_known_to_be_complete() -> None:
    names = [name for step in (1, 2, 3, 4) for name in files(step, [0], 1)]
    first = local_deletions(names, upto=3, ranks={0}, complete={3}, keep_last=1, uploading=set())
    assert first.records == ()
    second = local_deletions(names, upto=4, ranks={0}, complete={3, 4}, keep_last=1, uploading=set())
    assert steps_of(second.records) == {1, 2, 3}


@given(
    whole=st.sets(st.integers(1, 12)),
    torn=st.sets(st.integers(1, 12)),
    keep_last=st.integers(1, 4),
    keep_every=st.none() | st.integers(1, 5),
)
def test_the_newest_complete_snapshot_always_stays(
    whole: set[int], torn: set[int], keep_last: int, keep_every: int | None
) -> None:
    names = [name for step in whole for name in files(step, [0, 1], 2)]
    names += [name for step in torn - whole for name in files(step, [1], 2)]
    deletions = durable_deletions(names, upto=12, keep_last=keep_last, keep_every=keep_every)
    left = set(names) - {*deletions.records, *deletions.images}
    kept = set(complete_steps(left))
    assert set(sorted(whole)[-keep_last:]) <= kept
    assert kept <= whole
    assert all(image_name(step, rank, 2) in left for step in kept for rank in (0, 1))
