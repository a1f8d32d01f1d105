"""Environment of every test: no network, and no thread pools that compete with spawned ranks for the cores."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture(scope="session")
def rank_pool():
    """Gloo ranks (`distributed.pool.RankPool`), shared by the whole session."""
    from distributed.pool import RankPool

    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def single_rank():
    """A one-rank process group in this process, destroyed after the module's tests: others create their own."""
    import torch.distributed as dist

    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
