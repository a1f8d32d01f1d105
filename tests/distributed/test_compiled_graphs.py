"""Collectives stay outside compiled graphs."""

import pytest

from distributed.test_parity import CONFIG
from distributed.workers import captured_graphs

COLLECTIVE_MARKS = ("c10d", "all_reduce", "all_gather", "all_to_all", "reduce_scatter", "broadcast.", "wait_tensor")


@pytest.mark.parametrize(
    "options",
    [{}, {"activation_checkpointing": "full"}, {"slices": 4}],
    ids=lambda options: "+".join(options) or "plain",
)
def test_no_captured_graph_holds_a_collective(rank_pool, options):
    for graphs in rank_pool.run(2, captured_graphs, CONFIG, 2, **options):
        operations = [operation for graph in graphs for operation in graph]
        assert any("mm" in operation for operation in operations), "nothing was captured"
        assert any("scaled_dot_product" in operation for operation in operations)
        found = [operation for operation in operations if any(mark in operation for mark in COLLECTIVE_MARKS)]
        assert not found
        # A forward and a backward graph a segment, shared by both layers and both passes; of the softmax one a size,
        # and the last slice of the vocabulary is smaller, as the last stretch of tokens is.
        assert len(graphs) <= 12
