"""Lanes, shuffles and mixtures: the stream that several readers share out, cut anywhere and gone on with by others."""

from __future__ import annotations

import json
import os
import re
import resource
from collections import Counter
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colonnade.data.feed import step_shares
from colonnade.data.filesystems import allow_many_files
from colonnade.data.mixture import Mixture, WeightChange, normalized, parse_data_glob
from colonnade.data.order import deal_units, default_lanes, keyed_permutation
from colonnade.data.position import DataPosition
from colonnade.data.tokenization import EncoderPool
from colonnade.errors import RunError, UsageError
from colonnade.run_settings import RunSettings
from colonnade.telemetry.data_ledger import data_ledger, data_metrics
from data_helpers import (
    assert_same_blocks,
    flip_bit,
    plain_blocks,
    plain_tokens,
    stdlib_texts,
    tiny_tokenizer,
    write_corpus,
    write_shard,
)
from data_processing import Backend, TokenStream, streaming_token_generator
from run.data import read_validation, weight_changes

BLOCK = 16
GLOBAL_BATCH = 12
DP_SIZES = (1, 2, 3, 4, 6, 12)

TOKENIZER = tiny_tokenizer()

Blocks = dict[int, npt.NDArray[np.int32]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, stdlib_texts(), group=2)
    return str(folder / "*.parquet")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("mixture")
    write_corpus(folder / "prose", stdlib_texts()[:40], group=2)
    write_corpus(folder / "code", stdlib_texts()[40:], group=1)
    return f"prose={folder}/prose/*.parquet:3,code={folder}/code/*.parquet:1"


def open_stream(pattern: str, **changes: Any) -> TokenStream:
    return streaming_token_generator(pattern, TOKENIZER, **{"block_size": BLOCK, "workers": 1, **changes})


def uninterrupted(pattern: str, count: int, **changes: Any) -> Blocks:
    with open_stream(pattern, **changes) as stream:
        return {chunk.number: chunk.tokens for chunk in islice(stream, count)}


# --- order -----------------------------------------------------------------------------------------------------------


def test_chunk_g_is_the_next_block_of_lane_g_mod_v(corpus: str) -> None:
    with open_stream(corpus, lanes=4) as stream:
        units = stream.units[0]
        dealt = deal_units(units.unit_bytes, 4, 0, "data", shuffled=False)
        assert sorted(unit for lane in dealt for unit in lane) == list(range(len(units)))
        chunks = list(islice(stream, 200))
    for lane, members in enumerate(dealt):
        texts = [stdlib_texts()[2 * unit + row] for unit in members for row in (0, 1)]
        expected = plain_blocks(plain_tokens(texts), BLOCK, epochs=9)
        served = [chunk.tokens for chunk in chunks[lane::4]]
        assert_same_blocks(served, expected[: len(served)])


def test_units_are_dealt_evenly() -> None:
    sizes = np.random.default_rng(0).integers(1, 1000, 480).tolist()
    for shuffled in (False, True):
        loads = [sum(sizes[unit] for unit in lane) for lane in deal_units(sizes, 24, 1, shuffled=shuffled)]
        assert max(loads) - min(loads) <= 50  # of about 10,000 each


@pytest.mark.parametrize(
    ("units", "size", "expected"), [(1, 10**9, 1), (31, 10**9, 1), (32, 10**9, 2), (768, 10**9, 48), (768, 1024, 2)]
)
def test_default_lanes_follow_from_the_data(units: int, size: int, expected: int) -> None:
    assert default_lanes([[size] * units], 1024) == expected
    assert default_lanes([[10**9] * 10**4, [size] * units], 1024) == expected  # the smallest corpus decides


@pytest.mark.parametrize(("corpora", "expected"), [(1, 48), (8, 48), (9, 24), (16, 24), (17, 12), (48, 8), (64, 4)])
def test_default_lanes_leave_room_for_many_corpora(corpora: int, expected: int) -> None:
    lanes = default_lanes([[10**9] * 1000] * corpora, 1024)
    assert lanes == expected
    assert 2 * lanes * corpora < 1000


def test_every_epoch_holds_every_document_once_in_an_order_of_its_own(corpus: str) -> None:
    def epochs(seed: int) -> list[list[int]]:
        tokens: dict[int, list[int]] = {}
        with open_stream(corpus, shuffle=True, seed=seed, lanes=1, block_size=1) as stream:
            for chunk in stream:
                if chunk.epoch == 2:
                    break
                tokens.setdefault(chunk.epoch, []).append(int(chunk.tokens[0]))
        return [tokens[0], tokens[1]]

    plain = plain_tokens(stdlib_texts())
    first, second = epochs(1)
    assert [first, second] == epochs(1)
    assert len({tuple(plain), tuple(first), tuple(second), tuple(epochs(2)[0])}) == 4
    documents = [plain_tokens([text]) for text in stdlib_texts()]
    for order in (first, second):
        text = ",".join(map(str, order))
        # At block size 1 the last token of an epoch is a target only, so one document may lack its end.
        assert sum(",".join(map(str, document)) in text for document in documents) >= len(documents) - 1
        assert sum((Counter(plain) - Counter(order)).values()) == 1


def test_permutations_are_those_of_philox_in_any_version() -> None:
    """Bits of the generator itself (Salmon et al., SC 2011, known-answer vector of Philox 4x64-10 with zero key)."""
    assert np.random.Philox(key=0, counter=[2**64 - 1] * 4).random_raw() == 0x16554D9ECA36314C
    order = keyed_permutation(1000, "a", 1)
    assert sorted(order) == list(range(1000))
    assert order.tolist() != keyed_permutation(1000, "a", 2).tolist()


def test_a_permutation_follows_from_its_whole_key_alone() -> None:
    order = keyed_permutation(1000, 7, 0, 3)
    assert sorted(order.tolist()) == list(range(1000))
    assert np.array_equal(order, keyed_permutation(1000, 7, 0, 3))
    others = [keyed_permutation(1000, *key) for key in [(8, 0, 3), (7, 1, 3), (7, 0, 4)]]
    assert not any(np.array_equal(order, other) for other in others)
    # Every place is as likely for every number: over 4000 keys each of 5 x 5 is taken about 800 times (sigma 25).
    counts = np.zeros((5, 5))
    for key in range(4000):
        counts[np.arange(5), keyed_permutation(5, key, 0, 0)] += 1
    assert abs(counts - 800).max() < 150
    # Fixed for good: a checkpoint counts on finding the same order again.
    assert keyed_permutation(8, 1, 2, 3).tolist() == [2, 3, 7, 5, 0, 4, 1, 6]


# --- several readers, cut anywhere -----------------------------------------------------------------------------------


def serve(pattern: str, position: DataPosition | None, dp: int, steps: int, **changes: Any) -> tuple[Blocks, Any]:
    """What `dp` readers serve in `steps` steps, by chunk number, and the position after it."""
    served: Blocks = {}
    parts = []
    for rank in range(dp):
        with open_stream(pattern, position=position, reader=rank, readers=dp, **changes) as stream:
            first = stream.start.chunk
            shares = step_shares(stream, first, GLOBAL_BATCH, dp, rank, stream.apart)
            for step, share in enumerate(islice(shares, steps)):
                for index, tokens in enumerate(share.tokens):
                    number = first + step * GLOBAL_BATCH + rank + index * dp
                    assert number not in served
                    served[number] = tokens
            parts.append(share.position)
    merged = DataPosition.merged(parts, first)
    return served, DataPosition.from_dict(json.loads(json.dumps(merged.to_dict())))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chain=st.lists(
        st.tuples(
            st.sampled_from(DP_SIZES), st.integers(1, 4), st.sampled_from([1, 3, 64]), st.sampled_from([1, 2, 5])
        ),
        min_size=2,
        max_size=4,
    ),
    lanes=st.sampled_from([1, 2, 5, 12]),
    shuffle=st.booleans(),
    mixed=st.booleans(),
    packing=st.sampled_from(["concat", "best-fit"]),
    in_pieces=st.booleans(),
)
def test_any_chain_of_readers_serves_the_uninterrupted_stream(
    corpus: str, mixture: str, chain: list[Any], lanes: int, shuffle: bool, mixed: bool, packing: str, in_pieces: bool
) -> None:
    with ExitStack() as stack:
        if in_pieces:  # row groups of several windows and portions, as large ones are
            stack.enter_context(patch("colonnade.data.unit_reader.WINDOW_BYTES", 900))
            stack.enter_context(patch("colonnade.data.lane_reader.PORTION_BYTES", 400))
        check_chain(mixture if mixed else corpus, chain, lanes, shuffle, mixed, packing)


def check_chain(pattern: str, chain: list[Any], lanes: int, shuffle: bool, mixed: bool, packing: str) -> None:
    lanes = min(lanes, 4) if mixed else lanes  # a lane has to hold a block
    stream = {"lanes": lanes, "shuffle": shuffle, "packing": packing, "seed": 3}
    position, served = None, Blocks()
    for dp, steps, batch_rows, workers in chain:
        part, position = serve(pattern, position, dp, steps, **stream, batch_rows=batch_rows, workers=workers)
        assert not part.keys() & served.keys()
        served |= part
    expected = uninterrupted(pattern, len(served), **stream)
    assert served.keys() == expected.keys()
    for number, tokens in expected.items():
        assert served[number].tolist() == tokens.tolist(), number
    with open_stream(pattern, **stream) as whole:
        list(islice(whole, len(served)))
        assert position == whole.position


def test_readers_of_one_lane_that_disagree_are_an_error(tmp_path: Path) -> None:
    """Four readers of two lanes; the file of the last one was damaged on its host."""
    texts = [f"{text} (document {index})" for index, text in enumerate(stdlib_texts(20))]
    plain: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pattern = str(write_shard(tmp_path / "a.parquet", texts, group=2, **plain))
    parts = []
    for reader in range(4):
        if reader == 3:
            for document in (b"(document 0)", b"(document 2)", b"(document 4)"):
                flip_bit(Path(pattern), document)
        with open_stream(pattern, lanes=2, reader=reader, readers=4) as stream:
            parts.append(list(islice(stream, 20))[-1].position)
    with pytest.raises(RunError, match=r"lane 1 of corpus data is at .* rank 1 and at .* rank 3.*the same files"):
        DataPosition.merged(parts, 0)


def test_a_reader_opens_its_own_lanes_only(corpus: str) -> None:
    with open_stream(corpus, lanes=6, reader=1, readers=3) as stream:
        assert [chunk.number for chunk in islice(stream, 4)] == [1, 4, 7, 10]
        assert stream.lanes == [1, 4]
    with open_stream(corpus, lanes=6, reader=3, readers=4) as stream:  # gcd 2: lanes are shared with reader 1
        assert stream.lanes == [1, 3, 5]


# --- mixtures --------------------------------------------------------------------------------------------------------


@given(
    weights=st.lists(st.floats(0.05, 1.0), min_size=2, max_size=6),
    start=st.integers(0, 10**12),
)
def test_any_stretch_holds_the_corpora_in_their_shares(weights: list[float], start: int) -> None:
    shares = normalized(weights)
    mixed = Mixture([WeightChange(0, shares)])
    length = 512
    counts = Counter(mixed.corpus_of(start + offset) for offset in range(length))
    for corpus, share in enumerate(shares):
        # The discrepancy of the golden-ratio sequence is below (3 + log_phi(n) / 2) / n for an interval.
        assert abs(counts[corpus] - share * length) <= 12


def test_each_corpus_is_read_in_its_own_order_whatever_the_others(mixture: str) -> None:
    prose, code = (
        plain_blocks(plain_tokens(texts), BLOCK, epochs=9) for texts in (stdlib_texts()[:40], stdlib_texts()[40:])
    )
    with open_stream(mixture, lanes=1) as stream:
        chunks = list(islice(stream, 240))
        totals = stream.position.totals()
    turns = [Mixture(stream.position.schedule).corpus_of(number) for number in range(240)]
    by_corpus = [
        [chunk.tokens for chunk, turn in zip(chunks, turns, strict=True) if turn == corpus] for corpus in (0, 1)
    ]
    assert_same_blocks(by_corpus[0], prose[: len(by_corpus[0])])
    assert_same_blocks(by_corpus[1], code[: len(by_corpus[1])])
    assert abs(len(by_corpus[0]) - 180) <= 3
    assert [totals[name].tokens_delivered for name in ("prose", "code")] == [len(part) * BLOCK for part in by_corpus]


@given(weights=st.lists(st.floats(0.05, 1.0), min_size=3, max_size=6), ended=st.integers(0, 5), start=st.integers(0))
def test_the_chunks_of_an_ended_corpus_go_to_the_others_in_their_shares(
    weights: list[float], ended: int, start: int
) -> None:
    ended %= len(weights)
    mixed = Mixture([WeightChange(0, normalized(weights))])
    numbers = range(start, start + 512)
    others = [number for number in numbers if mixed.corpus_of(number) != ended]
    assert [mixed.corpus_of(number, {ended}) for number in others] == [mixed.corpus_of(number) for number in others]
    counts = Counter(mixed.corpus_of(number, {ended}) for number in numbers)
    left = sum(weights) - weights[ended]
    for corpus, weight in enumerate(weights):
        assert abs(counts[corpus] - (corpus != ended) * weight / left * 512) <= 24  # two intervals' discrepancies


@pytest.mark.parametrize("first_to_end", ["prose", "code"])
def test_one_epoch_of_a_mixture_holds_each_corpus_whole(mixture: str, first_to_end: str) -> None:
    if first_to_end == "code":
        mixture = mixture.replace(":3,", ":1,").removesuffix(":1") + ":9"
    expected = [plain_blocks(plain_tokens(texts), BLOCK) for texts in (stdlib_texts()[:40], stdlib_texts()[40:])]
    with open_stream(mixture, epochs=1) as stream:
        chunks = list(stream)
    assert len(chunks) == sum(map(len, expected))
    totals = [chunk.position.totals() for chunk in chunks]
    delivered = [[total[name].tokens_delivered for total in totals] for name in ("prose", "code")]
    for counts, blocks in zip(delivered, expected, strict=True):
        own = [chunk.tokens for chunk, step in zip(chunks, np.diff(counts, prepend=0), strict=True) if step]
        assert_same_blocks(own, blocks)
    assert delivered[first_to_end != "prose"].index(len(expected[first_to_end != "prose"]) * BLOCK) < len(chunks) - 20
    for cut in (10, len(chunks) - 15, len(chunks) - 1):
        with open_stream(mixture, epochs=1, position=chunks[cut - 1].position) as stream:
            assert_same_blocks([chunk.tokens for chunk in stream], [chunk.tokens for chunk in chunks[cut:]])


def test_validation_on_all_chunks_of_a_mixture_leaves_none_out(mixture: str) -> None:
    settings = RunSettings(validation_glob=mixture, validation_chunks=0, block_size=BLOCK)
    validation = read_validation(settings, TOKENIZER, Backend("hf"))
    assert validation is not None
    expected = [
        block.tolist()
        for texts in (stdlib_texts()[:40], stdlib_texts()[40:])
        for block in plain_blocks(plain_tokens(texts), BLOCK)
    ]
    assert sorted(validation.tokens.tolist()) == sorted(expected)


def test_weights_can_change_where_a_stream_goes_on(mixture: str) -> None:
    with open_stream(mixture, lanes=2) as stream:
        position = list(islice(stream, 60))[-1].position
    changed = mixture.replace(":3,", ":1,").replace(":1", ":9", 1)
    with open_stream(changed, position=position) as stream:
        after = list(islice(stream, 100))
    final = after[-1].position
    assert [change.chunk for change in final.schedule] == [0, 60]
    before, totals = position.totals(), final.totals()
    assert totals["prose"].tokens_delivered - before["prose"].tokens_delivered == pytest.approx(
        90 * BLOCK, abs=3 * BLOCK
    )
    # Where the position of the change is stored, going on is exact.
    with open_stream(changed, position=after[49].position) as stream:
        assert_same_blocks([chunk.tokens for chunk in islice(stream, 50)], [chunk.tokens for chunk in after[50:]])


def test_weights_written_at_another_scale_are_the_same(corpus: str, mixture: str) -> None:
    three = f"{mixture.replace(':3,', ':1,')},rest={corpus}:4"
    percent = three.replace(":1", ":0.01").replace(":4", ":0.04")
    shares = [normalized([part.weight for part in parse_data_glob(text)]) for text in (three, percent)]
    assert shares[0] != shares[1]  # by rounding
    with open_stream(three, lanes=1) as stream:
        chunks = list(islice(stream, 40))
    position = chunks[19].position
    record = {"data_position": position.to_dict()}
    assert weight_changes(record, RunSettings(data_glob=percent)) == []
    with open_stream(percent, position=position) as stream:
        assert stream.start == position
        assert_same_blocks([chunk.tokens for chunk in islice(stream, 20)], [chunk.tokens for chunk in chunks[20:]])
        assert stream.position == chunks[39].position
    almost = weight_changes(record, RunSettings(data_glob=three.replace(":4", ":4.00001")))
    (old, _, new) = almost[0].removeprefix("weights of prose, code, rest ").partition(" -> ")
    assert old != new


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a=x/*.parquet:1,y/*.parquet", r"'y/\*.parquet' has no name and weight.*for a comma in a path write"),
        ("a=x:0", "weight '0' must be a number above 0"),
        ("a=x:much", "weight 'much' must be"),
        ("a=x:1,a=y:2", "corpus a has weights 1 and 2"),
    ],
)
def test_bad_mixtures_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_data_glob(text)


def test_what_is_no_mixture_stays_a_pattern() -> None:
    for text in ("data/*.parquet", "a/*.parquet,b/*.arrow", "year=2024/*.parquet", "s3://bucket/year=2024/a.parquet"):
        assert [corpus.pattern for corpus in parse_data_glob(text)] == [text]
    parsed = parse_data_glob("web=s3://bucket/x=1/*.parquet:0.7, code=c/*.parquet:3e-1,web=d/*:0.7")
    assert [(corpus.name, corpus.pattern, corpus.weight) for corpus in parsed] == [
        ("web", "s3://bucket/x=1/*.parquet,d/*", 0.7),
        ("code", "c/*.parquet", 0.3),
    ]


def test_a_corpus_or_lane_without_a_block_is_found_before_the_first_chunk(tmp_path: Path) -> None:
    """However seldom its turn comes; by those readers that read it, of any number."""
    write_corpus(tmp_path / "much", stdlib_texts()[:40], group=2)
    write_corpus(tmp_path / "little", ["hello world", "good bye"], shards=1, group=1)
    much, little = f"a={tmp_path}/much/*.parquet:0.999", f"b={tmp_path}/little/*.parquet:0.001"
    tokens = len(plain_tokens(["hello world", "good bye"]))
    message = f"corpus b holds {tokens} tokens, one block needs {BLOCK + 1}"
    for reader in (0, 1):
        with open_stream(f"{much},{little}", lanes=1, reader=reader, readers=2) as stream:
            for _ in range(2):
                with pytest.raises(UsageError, match=message):
                    next(stream)
    write_shard(tmp_path / "holed.parquet", [*stdlib_texts()[11:13], None, None], group=2)
    for reader, fails in ((0, False), (1, True)):
        with open_stream(str(tmp_path / "holed.parquet"), lanes=2, reader=reader, readers=2) as stream:
            if not fails:
                assert next(stream).number == 0
                continue
            with pytest.raises(UsageError, match=r"lane 1 of 2 of the data holds 0 tokens.*or fewer --data-lanes"):
                next(stream)


@pytest.mark.parametrize("lanes", [0, -1, 4097])
def test_lanes_out_of_range_are_refused(corpus: str, lanes: int) -> None:
    with pytest.raises(UsageError, match=rf"--data-lanes is {lanes}; it must be from 1 to 4096"):
        open_stream(corpus, lanes=lanes)


def test_too_many_open_files_say_what_to_do(mixture: str) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, limits[1]))
    try:
        with open_stream(mixture, lanes=20) as stream, pytest.raises(RunError) as caught:
            next(stream)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert re.search(r"Too many open files.*raise ulimit -n, or give fewer --data-lanes", str(caught.value))


def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = min(512, limits[0]), limits[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        allow_many_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard % (1 << 64), 1 << 16), hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_what_is_read_to_try_the_corpora_is_not_read_again(mixture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: Counter[str] = Counter()
    encode = EncoderPool._encode

    def counting(pool: EncoderPool, batch: Any) -> Any:
        encoded.update(batch.texts.to_pylist())
        return encode(pool, batch)

    monkeypatch.setattr(EncoderPool, "_encode", counting)
    with open_stream(mixture, lanes=4, epochs=1) as stream:
        assert len(list(stream)) > 50
    assert set(encoded) <= set(stdlib_texts())
    assert set(encoded.values()) == {1}


def test_more_lanes_than_row_groups_are_refused(mixture: str) -> None:
    with pytest.raises(UsageError, match=r"--data-lanes 21 is more than the 20 units .* of corpus"):
        open_stream(mixture, lanes=21)


# --- data that changed -----------------------------------------------------------------------------------------------


def test_changed_data_is_refused_by_name_unless_it_is_allowed(tmp_path: Path) -> None:
    shards = write_corpus(tmp_path, stdlib_texts()[:40], group=2)
    pattern = str(tmp_path / "*.parquet")
    with open_stream(pattern, lanes=2) as stream:
        position = list(islice(stream, 25))[-1].position
    write_corpus(tmp_path / "other", stdlib_texts()[20:], group=2)[1].replace(shards[1])
    with pytest.raises(UsageError, match=r"changed or new: part_1\.parquet.*--allow-data-change"):
        open_stream(pattern, position=position)
    with open_stream(pattern, position=position, allow_data_change=True) as stream:
        chunk = next(stream)
    assert chunk.number == 25
    assert [change.chunk for change in chunk.position.changes] == [25]
    assert "part_1.parquet" in chunk.position.changes[0].what
    assert chunk.tokens.tolist() == open_blocks(pattern, 26, lanes=2)[1].tolist()  # lane 1 from its beginning
    assert chunk.position.totals()["data"].tokens_delivered == 26 * BLOCK
    # What has been allowed once is recorded, and needs no allowance again.
    with open_stream(pattern, position=chunk.position) as stream:
        assert next(stream).number == 26


def test_what_was_read_of_a_corpus_that_is_gone_stays_counted(mixture: str) -> None:
    with open_stream(mixture, lanes=2) as stream:
        position = list(islice(stream, 40))[-1].position
    code = position.totals()["code"]
    assert code.tokens_delivered > 0
    prose_only = mixture.partition(",code")[0]
    with open_stream(prose_only, position=position, allow_data_change=True) as stream:
        position = list(islice(stream, 8))[-1].position
    assert position.retired == (("code", code),)
    assert data_metrics(position)["data_tokens_read"] >= 48 * BLOCK
    assert data_ledger(position)["retired"]["code"]["tokens_delivered"] == code.tokens_delivered
    # When it comes back, its counts do.
    with open_stream(mixture, position=DataPosition.from_dict(position.to_dict()), allow_data_change=True) as stream:
        assert stream.start.totals()["code"] == code
        assert stream.start.retired == ()


def open_blocks(pattern: str, count: int, **changes: Any) -> Blocks:
    return uninterrupted(pattern, count, **changes)


def test_other_blocks_or_tokens_go_on_where_they_mean_the_same(corpus: str) -> None:
    """Another block size at the next token, other boundary tokens at the next row."""
    with open_stream(corpus, lanes=1) as stream:
        position = list(islice(stream, 30))[-1].position
    _, unit, row, token = position.states[0][0].cursor
    assert token > 0
    here = stdlib_texts()[2 * unit + row :]
    with open_stream(corpus, block_size=32, position=position, allow_data_change=True, epochs=1) as stream:
        served = [chunk.tokens for chunk in stream]
    assert_same_blocks(served, plain_blocks(plain_tokens(here)[token:], 32))
    bounded: dict[str, Any] = {"add_document_boundary_tokens": True}
    with open_stream(corpus, position=position, allow_data_change=True, epochs=1, **bounded) as stream:
        served = [chunk.tokens for chunk in stream]
    assert_same_blocks(served, plain_blocks(plain_tokens(here[1:], bos=1, eos=0), BLOCK))


@pytest.mark.parametrize("packing", ["concat", "best-fit"])
def test_a_corpus_that_did_not_change_goes_on_exactly(tmp_path: Path, packing: str) -> None:
    """The other one did: what is served of the first is what an uninterrupted stream of it alone serves."""
    settings: dict[str, Any] = {"lanes": 2, "shuffle": True, "packing": packing}
    write_corpus(tmp_path / "a", stdlib_texts(), group=5)
    write_corpus(tmp_path / "b", stdlib_texts(20), group=2)
    write_corpus(tmp_path / "c", stdlib_texts(30), group=2)
    old, new = (f"a={tmp_path}/a/*:1,b={tmp_path}/{other}/*:1" for other in "bc")
    with open_stream(old, **settings) as stream:
        chunks = list(islice(stream, 60))
    cursors = [state.cursor for state in chunks[-1].position.states[0]]
    assert all(cursor.token > 0 for cursor in cursors)
    with open_stream(new, position=chunks[-1].position, allow_data_change=True, **settings) as stream:
        assert [state.cursor for state in stream.start.states[0]] == cursors
        assert {state.cursor for state in stream.start.states[1]} == {(0, 0, 0, 0)}
        chunks += islice(stream, 60)
    turns = Mixture(chunks[-1].position.schedule)
    served = [[c.tokens for c in chunks if turns.corpus_of(c.number) == 0 and c.number % 2 == lane] for lane in (0, 1)]
    with open_stream(old, **settings) as stream:
        alone = list(islice(stream, 200))
    for lane in (0, 1):
        whole = [c.tokens for c in alone if turns.corpus_of(c.number) == 0 and c.number % 2 == lane]
        assert_same_blocks(served[lane], whole[: len(served[lane])])


def test_a_token_shard_keeps_its_place_under_another_tokenizer(tmp_path: Path) -> None:
    ids = (np.arange(5000) % 300 + 5).astype(np.uint16)
    np.save(tmp_path / "ids.npy", ids)
    with open_stream(f"{tmp_path}/ids.npy", lanes=1) as stream:
        position = list(islice(stream, 30))[-1].position
    bounded: dict[str, Any] = {"add_document_boundary_tokens": True, "epochs": 1}
    with open_stream(f"{tmp_path}/ids.npy", position=position, allow_data_change=True, **bounded) as stream:
        assert_same_blocks([c.tokens for c in stream], plain_blocks(ids.astype(np.int32).tolist(), BLOCK)[30:])
