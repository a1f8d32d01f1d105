"""Collectives stay outside compiled graphs."""

import pytest

from distributed.test_parity import CONFIG
from distributed.workers import captured_graphs

COLLECTIVE_MARKS = ("c10d", "all_reduce", "all_gather", "all_to_all", "reduce_scatter", "broadcast.", "wait_tensor")


@pytest.mark.parametrize(
    ("ranks", "options"),
    [(2, {}), (2, {"activation_checkpointing": "full"}), (2, {"slices": 4}), (1, {"slices": 8})],
    ids=["plain", "activation_checkpointing", "two slices a rank", "eight slices on one rank"],
)
def test_no_captured_graph_holds_a_collective(rank_pool, ranks, options):
    for graphs in rank_pool.run(ranks, captured_graphs, CONFIG, ranks, **options):
        operations = [operation for graph in graphs for operation in graph]
        assert any("mm" in operation for operation in operations), "nothing was captured"
        assert any("scaled_dot_product" in operation for operation in operations)
        found = [operation for operation in operations if any(mark in operation for mark in COLLECTIVE_MARKS)]
        assert not found
        # A forward and a backward graph for each segment, shared by layers, slices and both passes; for the softmax one
        # for each shape: the last slice of the vocabulary is smaller, and so is the last chunk of tokens.
        assert len(graphs) <= 12
