"""The batch feed: the same chunks at every number of ranks, and a failure that reaches the whole group."""

from itertools import islice

import pytest
import torch

from data_helpers import plain_blocks, plain_tokens, stdlib_texts, tiny_tokenizer, write_corpus
from data_processing import streaming_token_generator
from distributed.workers import fed_batches, fed_by_a_failing_reader

STEPS, CHUNKS_PER_STEP = 5, 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, stdlib_texts())
    return str(folder / "*.parquet")


@pytest.mark.parametrize(("world_size", "tp"), [(1, 1), (2, 2), (2, 1), (4, 2), (4, 1)])
@pytest.mark.parametrize("resume_after", [None, 2])
@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_every_number_of_ranks_serves_the_same_chunks(rank_pool, corpus, world_size, tp, lanes, resume_after):
    count = STEPS * CHUNKS_PER_STEP
    blocks = plain_blocks(plain_tokens(stdlib_texts()), 16)[:count]
    if lanes > 1:
        with streaming_token_generator(corpus, tiny_tokenizer(), block_size=16, lanes=lanes) as stream:
            blocks = [chunk.tokens for chunk in islice(stream, count)]
    expected = torch.stack([torch.from_numpy(block) for block in blocks])
    expected = expected.view(STEPS, CHUNKS_PER_STEP, 17)
    dp = world_size // tp
    arguments = corpus, tp, lanes, STEPS, CHUNKS_PER_STEP, resume_after
    for dp_rank, _, batches in rank_pool.run(world_size, fed_batches, *arguments):
        assert torch.equal(batches, expected[:, dp_rank::dp])


def test_a_failing_reader_ends_all_ranks_of_its_group(rank_pool):
    said = rank_pool.run(2, fed_by_a_failing_reader, 2)
    assert said[0] == "RunError: part_3.parquet is damaged"
    assert said[1].startswith("PeerError")
