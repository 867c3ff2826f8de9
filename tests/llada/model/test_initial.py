"""Filling parameters: of a sharded one each worker fills its own rows, with the numbers of the whole."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from llada.model import initial
from llada.model.initial import copy_full_, draw_normal_, local_rows


def draw(rows: int, width: int, *, seed: int = 3, name: str = "layers.0.q_proj.weight") -> torch.Tensor:
    drawn = torch.empty(rows, width)
    draw_normal_(drawn, seed, name, 1.0)
    return drawn


def test_rows_depend_on_their_number_and_on_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = draw(50, 12)
    assert torch.equal(draw(20, 12), whole[:20])
    monkeypatch.setattr(initial, "_CHUNK", 36)  # three rows at once
    assert torch.equal(draw(50, 12), whole)
    assert len(whole.flatten().unique()) == whole.numel()  # no two rows share a sequence
    for other in (draw(50, 12, seed=4), draw(50, 12, name="layers.1.q_proj.weight")):
        assert not (other == whole).any()


def test_numbers_are_those_of_a_normal_distribution_cut_at_three() -> None:
    drawn = draw(400, 1000).double().flatten().sort().values
    # Kolmogorov and Smirnov: the distance from the distribution function is below 1.95/√n in 999 of 1000 samples.
    cut = math.erf(3 / math.sqrt(2))
    expected = 0.5 + torch.erf(drawn / math.sqrt(2)) / (2 * cut)
    empirical = torch.arange(1, len(drawn) + 1) / len(drawn)
    assert (expected - empirical).abs().max() < 1.95 / math.sqrt(len(drawn))
    assert drawn.abs().max() <= 3 * (1 + 1e-6)


@pytest.fixture
def workers(tmp_path: Path):
    """Six workers that are one process: nothing here communicates."""
    if dist.is_initialized():
        pytest.skip("this process is in a group already")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def be(rank: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=6)

    yield be
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=["sharded", "replicas"])
@pytest.mark.parametrize("rows", [12, 13, 4, 1])
def test_shards_are_rows_of_the_whole(workers, shape: tuple[int, ...], rows: int) -> None:
    """Also where some workers have fewer rows than others, or none; replicas hold the same."""
    whole, full, seen = draw(rows, 5), torch.randn(rows, 5), []
    for rank in range(6):
        workers(rank)
        mesh = init_device_mesh("cpu", shape)
        placements = [Shard(0)] if len(shape) == 1 else [Replicate(), Shard(0)]
        count = -(-rows // shape[-1])
        column = rank % shape[-1]
        mine = slice(min(rows, column * count), min(rows, (column + 1) * count))
        local = torch.zeros(mine.stop - mine.start, 5)
        sharded = DTensor.from_local(
            local, mesh, placements, run_check=False, shape=torch.Size((rows, 5)), stride=(5, 1)
        )
        draw_normal_(sharded, 3, "layers.0.q_proj.weight", 1.0)
        assert torch.equal(local, whole[mine])
        if len(local):
            assert local_rows(sharded)[1] == mine.start
        copy_full_(sharded, full)
        assert torch.equal(local, full[mine])
        seen.append(local)
    assert torch.equal(torch.cat(seen[: shape[-1]]), full)
