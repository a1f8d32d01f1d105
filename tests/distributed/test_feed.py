"""The batch feed: the same chunks at every number of ranks, and a failure that reaches the whole group."""

import pytest
import torch

from data_helpers import plain_blocks, plain_tokens, stdlib_texts, write_corpus
from distributed.workers import fed_batches, fed_by_a_failing_reader

STEPS, CHUNKS_PER_STEP = 5, 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, stdlib_texts())
    return str(folder / "*.parquet")


@pytest.mark.parametrize(("world_size", "tp"), [(1, 1), (2, 2), (2, 1), (4, 2), (4, 1)])
@pytest.mark.parametrize("resume_after", [None, 2])
def test_every_number_of_ranks_serves_the_same_chunks(rank_pool, corpus, world_size, tp, resume_after):
    blocks = plain_blocks(plain_tokens(stdlib_texts()), 16)
    expected = torch.stack([torch.from_numpy(block) for block in blocks[: STEPS * CHUNKS_PER_STEP]])
    expected = expected.view(STEPS, CHUNKS_PER_STEP, 17)
    dp = world_size // tp
    for dp_rank, _, batches in rank_pool.run(world_size, fed_batches, corpus, tp, STEPS, CHUNKS_PER_STEP, resume_after):
        assert torch.equal(batches, expected[:, dp_rank::dp])


def test_a_failing_reader_ends_all_ranks_of_its_group(rank_pool):
    said = rank_pool.run(2, fed_by_a_failing_reader, 2)
    assert said[0] == "RunError: part_3.parquet is damaged"
    assert said[1].startswith("PeerError")
