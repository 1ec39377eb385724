"""Layers over the ranks of real process groups, beside the plain modules that they stand for."""

import pytest
from torch import nn

from tests.kernels.layers import jobs
from tests.multiprocess import ranks


@pytest.mark.parametrize("sequence", [False, True])
def test_outputs_and_gradients_are_those_of_the_plain_module(sequence: bool) -> None:
    ranks.run(jobs.as_the_plain_one, 2, sequence)


def test_sequences_may_be_cut_along_the_first_dimension_and_norms_be_rms_norms() -> None:
    ranks.run(jobs.as_the_plain_one, 4, True, 0, nn.RMSNorm)


def test_state_dicts_have_the_names_shapes_and_numbers_of_the_plain_module() -> None:
    placed = ranks.run(jobs.placements, 2)[0]
    replicated, rows, columns = (str(jobs.PLACED[name]) for name in ("replicated", "sharded 0", "sharded 1"))
    assert placed == {
        "norm.weight": replicated, "norm.bias": replicated,
        "up.weight": rows, "up.bias": rows, "down.weight": columns, "down.bias": replicated,
    }  # fmt: skip


@pytest.mark.parametrize("sequence", [False, True])
def test_whole_layers_compile_to_one_graph_with_the_same_results(sequence: bool) -> None:
    ranks.run(jobs.compiled, 2, sequence)


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_they_train_to_the_same_losses_inside_data_parallelism(how: str) -> None:
    losses = ranks.run(jobs.inside_others, 4, how)[0]
    assert losses[-1] < losses[0]


def test_blocks_give_over_many_ranks_what_they_give_on_one() -> None:
    ranks.run(jobs.blocks, 4)


def test_wrong_layers_say_what_is_wrong_on_all_ranks_alike() -> None:
    told = ranks.run(jobs.wrong_layers, 2)
    assert told[0] == told[1]
    causes = [
        "5 out_features cannot be cut", "5 in_features cannot be cut", "LayerNorm", "ColumnParallelLinear cannot",
        "Linear cannot be made", "3 heads", "3 tokens", "5 is not 4", "3 tokens", "2 dimensions",
    ]  # fmt: skip
    assert [cause for cause, text in zip(causes, told[0], strict=True) if cause not in text] == []
