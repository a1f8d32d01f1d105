"""Two hosts: two torchrun agents, in network namespaces of their own where this machine allows it, else on loopback.

Not part of `make test`: each run starts torch six times or more.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from distributed.launching import ROOT, losses
from faults.conftest import STEPS
from faults.runs import assert_same_end

pytestmark = pytest.mark.slow


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Host(NamedTuple):
    """A network namespace and its cable to the other."""

    name: str
    cable: str
    address: str


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host] | None]:
    """Two hosts joined by a cable; None where no namespaces can be made."""
    made = [
        Host(f"colonnade-{os.getpid()}-{number}", f"cln{os.getpid() % 10000}{number}", f"10.213.77.{number + 1}")
        for number in (0, 1)
    ]
    one, other = made
    try:
        for host in made:
            ip("netns", "add", host.name)
        peer = ("peer", "name", other.cable, "netns", other.name)
        ip("link", "add", one.cable, "netns", one.name, "type", "veth", *peer)
        for host in made:
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.cable)
            ip("-n", host.name, "link", "set", host.cable, "up")
            ip("-n", host.name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError):
        yield None
    else:
        yield made
    if shutil.which("ip"):
        for host in made:
            subprocess.run(["ip", "netns", "del", host.name], check=False, capture_output=True)


class Agents:
    """torchrun on both hosts, one rank each; `files` hold their output."""

    def __init__(self, hosts: list[Host] | None, flags: list[str], folder: Path, port: int) -> None:
        self.files = [folder / f"host_{number}.txt" for number in (0, 1)]
        self.agents = []
        addresses = [host.address for host in hosts] if hosts else ["localhost", "localhost"]
        for number, file in enumerate(self.files):
            line = [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
                *("--max-restarts=1", "--rdzv-backend=c10d", f"--rdzv-id={folder.name}"),
                *(f"--rdzv-endpoint={addresses[0]}:{port}", f"--rdzv-conf=is_host={1 - number}"),
                *(f"--local-addr={addresses[number]}", str(ROOT / "training.py"), *flags),
            ]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
            if hosts:
                environment["GLOO_SOCKET_IFNAME"] = hosts[number].cable
                line = ["ip", "netns", "exec", hosts[number].name, *line]
            with file.open("w") as stream:
                self.agents.append(subprocess.Popen(line, env=environment, stdout=stream, stderr=subprocess.STDOUT))

    def rank_of(self, number: int) -> psutil.Process:
        """The training process on a host."""
        children = psutil.Process(self.agents[number].pid).children(recursive=True)
        return next(child for child in children if str(ROOT / "training.py") in child.cmdline())

    def until_step(self, directory: Path, step: int) -> None:
        deadline = time.monotonic() + 120
        while not (directory / "metrics.jsonl").exists() or step not in losses(directory):
            assert time.monotonic() < deadline, self.files[0].read_text()[-2000:]
            time.sleep(0.05)

    def finish(self) -> list[int]:
        try:
            return [agent.wait(180) for agent in self.agents]
        finally:
            for agent in self.agents:
                agent.kill()


def test_a_rank_killed_on_the_second_host_costs_nothing(
    hosts: list[Host] | None, flags: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    agents = Agents(hosts, [*flags, "--checkpoint-dir", str(directory)], tmp_path, 29511)
    agents.until_step(directory, 8)
    agents.rank_of(1).kill()
    assert agents.finish() == [0, 0], agents.files[0].read_text()[-2000:]
    assert "going on from" in agents.files[0].read_text() + agents.files[1].read_text()
    assert_same_end(directory, undisturbed, STEPS, tmp_path)


def test_a_cable_that_is_pulled_ends_both_sides(hosts: list[Host] | None, flags: list[str], tmp_path: Path) -> None:
    if hosts is None:
        pytest.skip("needs the right to make network namespaces")
    directory = tmp_path / "run"
    these = [*flags, "--checkpoint-dir", str(directory), "--step-timeout", "4"]
    these[these.index(str(STEPS))] = "4000"
    agents = Agents(hosts, these, tmp_path, 29512)
    agents.until_step(directory, 8)
    ranks = [agents.rank_of(0), agents.rank_of(1)]
    ip("-n", hosts[1].name, "link", "set", hosts[1].cable, "down")
    _, alive = psutil.wait_procs(ranks, timeout=40)
    ip("-n", hosts[1].name, "link", "set", hosts[1].cable, "up")
    for agent in agents.agents:
        agent.kill()
    # torchrun on the host that lost its store does not come to reap its rank.
    assert all(rank.status() == psutil.STATUS_ZOMBIE for rank in alive)
    for number, other in ((0, 1), (1, 0)):
        said = agents.files[number].read_text()
        assert f"took longer than 4 s: rank {other} gives no sign; rank {number} is in step" in said
    assert len(list((directory / "hangs").glob("rank_*.txt"))) == 2
