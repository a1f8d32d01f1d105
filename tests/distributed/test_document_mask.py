"""Packed documents against the same documents run one by one: losses, logits, every gradient, bits."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import LlamaConfig, LlamaForCausalLM

from colonnade.data.blocks import counted_targets, pack_blocks, unpack_blocks
from colonnade.decoder import attention
from colonnade.decoder.attention import attend, document_kernel, document_layout, takes_groups
from colonnade.decoder.compilation import cpu_compiler
from colonnade.parallel.mesh import init_parallel
from dense_reference import assert_gradients_equal, dense_logits, dense_loss, relative_error
from distributed.test_bits import STEPS, differing
from distributed.test_parity import CONFIG, is_vocabulary
from distributed.workers import captured_graphs, deterministic_steps, packed_step
from model import TensorParallelModel
from run.batch import _probe_seconds
from run.measurements import validate
from run.state import Validation

BLOCK = 48
# Lengths of the documents of each row of BLOCK + 1 tokens; what they do not fill is padding.
ROWS = [[49], [1, 7, 20, 21], [30, 1, 1, 6], [2, 2, 2, 43], [25, 24], [1], [13, 36], [40, 8]]


def packed(rows, vocab_size=CONFIG.vocab_size, seed=0, width=BLOCK + 1):
    """The rows in the wire format, and the tokens of their documents, row by row."""
    generator = np.random.default_rng(seed)
    documents = [[generator.integers(0, vocab_size, length) for length in row] for row in rows]
    tokens = np.zeros((len(rows), width), np.int32)
    starts, padding = np.zeros(tokens.shape, np.bool_), np.ones(tokens.shape, np.bool_)
    for index, row in enumerate(documents):
        begin = 0
        for document in row:
            tokens[index, begin : begin + len(document)] = document
            starts[index, begin] = True
            padding[index, begin : begin + len(document)] = False
            begin += len(document)
    documents = [[torch.from_numpy(document) for document in row] for row in documents]
    return torch.from_numpy(pack_blocks(tokens, starts, padding)), documents


def dense_one_by_one(config, weights, documents):
    """Loss, gradients and logits of the dense reference, each document a batch of its own."""
    leaves = {name: value[: config.vocab_size] if is_vocabulary(name) else value for name, value in weights.items()}
    leaves = {name: value.clone().requires_grad_() for name, value in leaves.items()}
    sizes = config.to_dict()
    alone = [document[None] for row in documents for document in row]
    loss = sum(dense_loss(leaves, sizes, one[:, :-1], one[:, 1:]) for one in alone if one.shape[1] > 1)
    loss.backward()
    with torch.no_grad():
        logits = [torch.cat([dense_logits(leaves, sizes, one[None])[0] for one in row]) for row in documents]
    return loss.detach(), leaves, logits


VARIANTS = {
    "plain": (CONFIG, {}),
    "fp64": (CONFIG, {"param_dtype": torch.float64}),
    "one key/value head": (dataclasses.replace(CONFIG, num_key_value_heads=1), {}),
    "no shared heads, biases": (
        dataclasses.replace(CONFIG, num_key_value_heads=8, attention_bias=True, mlp_bias=True),
        {},
    ),
    "slices": (CONFIG, {"slices": 8}),
    "checkpointing": (CONFIG, {"activation_checkpointing": "full"}),
    "checkpointing, slices": (CONFIG, {"activation_checkpointing": "full", "slices": 4}),
}


def assert_equals_documents_one_by_one(config, wire, documents, results, fp64=False):
    main = results[0]
    loss, leaves, logits = dense_one_by_one(config, main["parameters"], documents)
    for rank, result in enumerate(results):
        assert float(result["loss"]) == pytest.approx(float(loss), rel=1e-10 if fp64 else 1e-6), f"rank {rank}"
    limit = 1e-10 if fp64 else 1e-5
    assert_gradients_equal(main["gradients"], {name: leaf.grad for name, leaf in leaves.items()}, limit)
    for row, expected in zip(main["logits"], logits, strict=True):
        expected = expected[: row.shape[0]]  # a row's last token is a label only
        assert relative_error(row[: len(expected)], expected) <= limit


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_packed_documents_equal_documents_one_by_one(rank_pool, tp, variant):
    config, options = VARIANTS[variant]
    wire, documents = packed(ROWS)
    results = rank_pool.run(tp, packed_step, config, tp, wire, seed=5, **options)
    assert_equals_documents_one_by_one(config, wire, documents, results, fp64=variant == "fp64")


@pytest.mark.skipif(cpu_compiler() is None, reason="needs a C++ compiler")
def test_compiled_segments_equal_documents_one_by_one(rank_pool):
    # Of the shape that tests/distributed/test_parity.py compiles as well: what both have in common comes from a cache.
    wire, documents = packed([[25], [3, 1, 12, 9], [7, 7]], width=25)
    options = {"compiled": True, "activation_checkpointing": "full", "seed": 5}
    results = rank_pool.run(1, packed_step, CONFIG, 1, wire, **options)
    assert_equals_documents_one_by_one(CONFIG, wire, documents, results)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_gradients_equal_transformers(single_rank, tied):
    """transformers' Llama is told of the documents by position_ids and a block-diagonal mask written out here."""
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    model = TensorParallelModel(config, init_parallel(1, torch.device("cpu")), seed=3)
    twin = LlamaForCausalLM(LlamaConfig(**config.to_dict(), attn_implementation="eager"))
    twin.load_state_dict(dict(model.full_parameters()), strict=False)
    wire, documents = packed(ROWS)
    positions = torch.zeros(len(ROWS), BLOCK, dtype=torch.int64)
    mask = torch.full((len(ROWS), 1, BLOCK, BLOCK), torch.finfo(torch.float32).min)
    targets = torch.full((len(ROWS), BLOCK), -100)
    real = torch.zeros(len(ROWS), BLOCK, dtype=torch.bool)
    for row, own in enumerate(documents):
        begin = 0
        for document in [*own, torch.empty(BLOCK + 1 - sum(map(len, own)))]:
            begin, end = min(begin, BLOCK), min(begin + len(document), BLOCK)
            positions[row, begin:end] = torch.arange(end - begin)
            mask[row, 0, begin:end, begin:end] = torch.full((end - begin, end - begin), mask.min()).triu(1)
            if not document.is_floating_point():
                real[row, begin:end] = True
                targets[row, begin : begin + len(document) - 1] = document[1:]
            begin = end

    blocks = unpack_blocks(wire, document_mask=True)
    assert torch.equal(blocks.labels, targets)
    expected = twin(blocks.input_ids, attention_mask=mask, position_ids=positions).logits
    assert relative_error(model.logits(blocks.input_ids, blocks.document_starts)[real], expected[real]) <= 1e-5
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum")
    loss.backward()
    ours = model(blocks.input_ids, blocks.labels, blocks.document_starts)
    ours.backward()
    assert float(ours.detach()) == pytest.approx(float(loss.detach()), rel=1e-6)
    assert_gradients_equal(
        {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()},
        {name: parameter.grad for name, parameter in twin.named_parameters()},
    )


@pytest.mark.parametrize(
    ("compute_dtype", "shapes"),
    [(torch.float32, [(2, 2), (4, 4), (4, 2)]), (torch.bfloat16, [(4, 4), (2, 1)]), (torch.float16, [(2, 2)])],
    ids=["fp32", "bf16", "fp16"],
)
def test_deterministic_steps_have_the_same_bits_at_every_number_of_ranks(rank_pool, compute_dtype, shapes):
    wire, _ = packed(ROWS)
    assert 0 < counted_targets(wire, document_mask=True) < wire[:, 1:].numel()
    options = {"slices": 8, "compute_dtype": compute_dtype, "packed": wire, "seed": 2}
    expected = rank_pool.run(1, deterministic_steps, CONFIG, 1, STEPS, **options)[0]
    for world_size, tp in shapes:
        results = rank_pool.run(world_size, deterministic_steps, CONFIG, tp, STEPS, **options)
        assert differing(expected, results) == [], f"{world_size} ranks, tp {tp}"


@pytest.mark.parametrize("slices", [None, 4])
def test_no_layout_of_documents_is_compiled_anew(rank_pool, slices):
    layouts = [packed(rows, seed=seed)[0] for seed, rows in enumerate([ROWS[:2], ROWS[2:4], ROWS[4:6], ROWS[6:8]])]
    once = rank_pool.run(2, captured_graphs, CONFIG, 2, layouts[:1], slices=slices)
    for_all = rank_pool.run(2, captured_graphs, CONFIG, 2, layouts, slices=slices)
    for graphs, more in zip(once, for_all, strict=True):
        assert len(graphs) == len(more) <= 10
        assert any("scaled_dot_product" in operation for graph in graphs for operation in graph)


def test_validation_and_the_probe_keep_to_documents(single_rank, monkeypatch):
    layout = init_parallel(1, torch.device("cpu"))
    model = TensorParallelModel(CONFIG, layout, seed=5)
    wire, documents = packed(ROWS)
    loss, _, _ = dense_one_by_one(CONFIG, dict(model.full_parameters()), documents)
    targets = sum(len(document) - 1 for row in documents for document in row)
    # Batches of 3: the last of the 8 rows is filled up.
    settings = SimpleNamespace(document_mask=True)
    run = SimpleNamespace(model=model, layout=layout, batch=SimpleNamespace(micro_batch_size=3), settings=settings)
    found = validate(run, Validation(wire, 0.0))
    assert found["validation_loss"] == pytest.approx(float(loss) / targets, rel=1e-6)

    seen = []
    forward = TensorParallelModel.forward
    monkeypatch.setattr(TensorParallelModel, "forward", lambda *args: seen.append(args[3]) or forward(*args))
    assert _probe_seconds(model, 2, BLOCK, warm=False, document_mask=True) > 0
    assert _probe_seconds(model, 2, BLOCK, warm=False, document_mask=False) > 0
    assert seen[0].shape == (2, BLOCK)
    assert seen[1] is None


# ------------------------------------------------------------------------------------------------------- kernels


KERNELS = ("documents", "masked", "flex")


def starts_of(rows, block, probability, seed=0):
    return torch.rand(rows, block, generator=torch.Generator().manual_seed(seed)) < probability


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("block", [5, 128, 200])
@pytest.mark.parametrize("heads", [2, 8])
def test_every_kernel_equals_scores_written_out(kernel, block, heads):
    generator = torch.Generator().manual_seed(1)
    starts = starts_of(3, block, 0.03)
    query = torch.randn(3, 8, block, 16, generator=generator)
    key, value = (torch.randn(3, heads, block, 16, generator=generator) for _ in range(2))
    layout = document_layout(starts, kernel)
    mixed = attend(query, key, value, layout.mask)
    for row in range(3):
        begins = sorted({0, *starts[row].nonzero().flatten().tolist()})
        for begin, end in zip(begins, [*begins[1:], block], strict=True):
            assert torch.equal(layout.positions[row, begin:end], torch.arange(end - begin))
            for head in range(8):
                q, k, v = query[row, head], key[row, head * heads // 8], value[row, head * heads // 8]
                scores = (q[begin:end] @ k[begin:end].T / 4).double()
                scores += torch.full_like(scores, -torch.inf).triu(1)
                expected = scores.softmax(dim=1) @ v[begin:end].double()
                assert relative_error(mixed[row, head, begin:end].double(), expected) <= 1e-5


@pytest.mark.parametrize("block", [1, 7, 128, 200, 700])
@pytest.mark.parametrize("probability", [0.0, 0.004, 0.1, 1.0])
def test_block_mask_is_the_one_torch_makes(block, probability):
    starts = starts_of(3, block, probability)
    ours = document_layout(starts, "flex").mask
    documents = starts.cumsum(1)

    def within(batch, head, query, key):
        return (query >= key) & (documents[batch, query] == documents[batch, key])

    theirs = create_block_mask(within, 3, None, block, block, device="cpu")
    assert ours.seq_lengths == theirs.seq_lengths
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(ours, f"{kind}_num_blocks")
        assert torch.equal(counts, getattr(theirs, f"{kind}_num_blocks"))
        used = torch.arange(getattr(ours, f"{kind}_indices").shape[-1]) < counts.unsqueeze(-1)
        assert torch.equal(getattr(ours, f"{kind}_indices")[used], getattr(theirs, f"{kind}_indices")[used])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_document_sees_another(single_rank, kernel):
    config = dataclasses.replace(CONFIG, head_dim=16)
    model = TensorParallelModel(config, init_parallel(1, torch.device("cpu")), seed=1)
    assert model.document_kernel == "documents"
    ids = torch.randint(0, config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(2))
    starts = torch.zeros(1, 40, dtype=torch.bool)
    starts[0, [11, 29]] = True
    other = ids.clone()
    other[0, :11] = (other[0, :11] + 1) % config.vocab_size
    other[0, 29:] = (other[0, 29:] + 1) % config.vocab_size
    model.document_kernel = kernel
    before, after = model.logits(ids, starts), model.logits(other, starts)
    assert torch.equal(before[:, 11:29], after[:, 11:29])
    assert not torch.equal(before[:, :11], after[:, :11])
    assert relative_error(before[:, 11:29], model.logits(ids[:, 11:29])) <= 1e-5
    assert relative_error(model.logits(ids)[:, 11:29], before[:, 11:29]) > 1e-2  # the mask has something to hide


def test_kernel_follows_the_device():
    cpu = torch.device("cpu")
    assert document_kernel(cpu, 64, torch.float32, compiled=False) == "documents"
    assert document_kernel(cpu, 64, torch.float32, compiled=True) == "masked"
    cuda = torch.device("cuda")
    assert document_kernel(cuda, 8, torch.bfloat16, compiled=False) == "masked"
    assert document_kernel(cuda, 64, torch.float64, compiled=True) == "masked"


def test_heads_are_repeated_where_no_fused_kernel_takes_groups(monkeypatch):
    assert not takes_groups(torch.device("cpu"), torch.bfloat16)
    cuda = torch.device("cuda")
    for major, expected in ((7, False), (8, True), (9, True)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, major=major: SimpleNamespace(major=major))
        assert takes_groups(cuda, torch.bfloat16) == expected
        assert not takes_groups(cuda, torch.float32)


@pytest.mark.parametrize("takes", [False, True])
def test_attention_repeats_heads_where_it_has_to(takes, monkeypatch):
    seen = []

    def recorded(query, key, value, *, enable_gqa=False, **options):
        seen.append((key.shape[1], value.shape[1], enable_gqa))
        return real(query, key, value, enable_gqa=enable_gqa, **options)

    real = attention.F.scaled_dot_product_attention
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", recorded)
    query, key, value = torch.randn(2, 4, 8, 16), torch.randn(2, 2, 8, 16), torch.randn(2, 2, 8, 16)
    found = attend(query, key, value, None, grouped=takes)
    repeated = (each.repeat_interleave(2, dim=1) for each in (key, value))
    torch.testing.assert_close(found, real(query, *repeated, is_causal=True))
    assert seen == [(2, 2, True) if takes else (4, 4, False)]
