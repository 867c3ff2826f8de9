"""Optimizers and the learning-rate schedule."""

import pytest
import torch

from llada.errors import UserError
from llada.model.transformer import ModelConfig, Transformer
from llada.training import optim
from llada.training.optim import (
    OptimConfig,
    build_optimizers,
    lr_factor,
    map_whole_matrices,
    schedule_faults,
    set_lr,
    step_all,
)


def small_model() -> Transformer:
    model = Transformer(ModelConfig(vocab_size=11, d_model=8, num_layers=2, num_heads=2, ffn_dim=12))
    model.init_weights(0)
    return model


def test_lr_warms_up_holds_and_decays() -> None:
    config = OptimConfig(warmup_steps=4, decay_fraction=0.25, final_lr_ratio=0.1)
    factors = [lr_factor(step, 40, config) for step in range(40)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:30] == [1.0] * 26
    assert factors[30:] == pytest.approx([1 - 0.9 * k / 10 for k in range(1, 11)])
    assert factors[-1] == pytest.approx(0.1)


def test_lladas_schedule_with_its_drop() -> None:
    """4e-4 until 1.2 of 2.3 T tokens, 1e-4 for 0.8 T, then down to 1e-5."""
    config = OptimConfig(
        lr=4e-4, warmup_steps=20, drops=((1.2 / 2.3, 0.25),), decay_fraction=0.3 / 2.3, final_lr_ratio=0.025
    )
    rate = [4e-4 * lr_factor(step, 2300, config) for step in range(2300)]
    assert rate[19] == rate[1199] == 4e-4
    assert rate[1200] == rate[1999] == pytest.approx(1e-4)
    assert rate[2149] == pytest.approx(5.5e-5, rel=1e-3)
    assert rate[2299] == pytest.approx(1e-5)


def test_illadas_cosine_begins_flat_and_ends_flat() -> None:
    config = OptimConfig(warmup_steps=10, decay="cosine", decay_fraction=0.5, final_lr_ratio=0.025)
    rate = torch.tensor([lr_factor(step, 2000, config) for step in range(2000)], dtype=torch.float64)
    assert (rate[10:1000] == 1).all()
    # 5e-6 + (2e-4 − 5e-6) · (1 + cos πx) / 2, as warm-up–cosine schedules are written.
    x = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(2e-4 * rate[1000:], 5e-6 + (2e-4 - 5e-6) * (1 + torch.cos(torch.pi * x)) / 2)
    assert rate[-1] == pytest.approx(0.025)


def test_lr_corner_cases() -> None:
    assert lr_factor(0, 10, OptimConfig(warmup_steps=0, decay_fraction=0)) == 1.0
    assert lr_factor(9, 10, OptimConfig(warmup_steps=0, decay_fraction=0)) == 1.0
    assert lr_factor(0, 1, OptimConfig(warmup_steps=0, decay_fraction=1.0, final_lr_ratio=0.0)) == 0.0
    everything = OptimConfig(warmup_steps=0, decay_fraction=1.0, final_lr_ratio=0.0)
    assert [lr_factor(s, 4, everything) for s in range(4)] == [0.75, 0.5, 0.25, 0.0]
    for bad in ({"decay_fraction": 1.5}, {"lr": 0.0}, {"warmup_steps": -1}):
        with pytest.raises(ValueError, match="optim"):
            OptimConfig(**bad)


@pytest.mark.parametrize(
    ("drops", "at"),
    [(((0.5, 0.1), (0.2, 0.5)), "0.5, 0.2"), (((0.5, 0.1), (0.5, 0.2)), "0.5, 0.5"), (((1.5, 0.1),), "1.5")],
)
def test_drops_stand_in_the_order_of_the_run(drops: tuple, at: str) -> None:
    with pytest.raises(
        UserError, match=rf"optim: drops must stand at rising shares of the run below 1, not at {at}$"
    ):
        OptimConfig(drops=drops)
    OptimConfig(drops=((0.2, 0.5), (0.5, 0.1)))


@pytest.mark.parametrize(
    ("steps", "changes", "said"),
    [
        (100, {}, None),
        (100, {"warmup_steps": 100, "decay_fraction": 0.0}, None),
        (
            100,
            {"warmup_steps": 200},
            "more than the run's 100 steps: the learning rate ends at 50% of its peak",
        ),
        (
            100,
            {"warmup_steps": 90},
            "reaches into the decay that optim.decay_fraction 0.2 begins at step 80 of 100",
        ),
        (100, {"drops": ((0.9, 0.5),)}, "the drop at 0.9 of the run falls into its decay"),
        (100, {"drops": ((0.05, 0.5),)}, "the drop at 0.05 of the run falls into its warm-up"),
    ],
    ids=str,
)
def test_what_a_schedule_cannot_do_is_said(steps: int, changes: dict, said: str | None) -> None:
    faults = schedule_faults(steps, OptimConfig(**{"warmup_steps": 10} | changes))
    assert len(faults) == (said is not None)
    assert said is None or said in faults[0]


def test_every_parameter_is_moved_by_one_optimizer_with_its_decay() -> None:
    model = small_model()
    names = {id(p): name for name, p in model.named_parameters()}
    for kind in ("adamw", "muon"):
        config = OptimConfig(optimizer=kind, lr=1e-3, muon_lr=2e-3, weight_decay=0.3)  # type: ignore[arg-type]
        optimizers = build_optimizers(model, config)
        seen = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
        assert sorted(seen) == sorted(names)
        for optimizer in optimizers:
            muon = isinstance(optimizer, torch.optim.Muon)
            for group in optimizer.param_groups:
                assert group["peak_lr"] == group["lr"] == (2e-3 if muon else 1e-3)
                for p in group["params"]:
                    name = names[id(p)]
                    assert group["weight_decay"] == (0.0 if name.endswith("norm.weight") else 0.3), name
                    assert muon == (kind == "muon" and name.startswith("layers.") and p.ndim == 2), name
        set_lr(optimizers, 0.5)
        assert {g["lr"] for o in optimizers for g in o.param_groups} == (
            {5e-4, 1e-3} if kind == "muon" else {5e-4}
        )


@pytest.mark.parametrize("orthogonalise_in", [torch.bfloat16, torch.float32])
def test_muon_on_one_worker_is_torchs(monkeypatch: pytest.MonkeyPatch, orthogonalise_in: torch.dtype) -> None:
    """Bit for bit where the hardware has bfloat16 (torch's own choice), and close in float32."""
    monkeypatch.setattr(optim, "resolve_precision", lambda *_: orthogonalise_in)
    ours, theirs = small_model(), small_model()
    start = {name: p.detach().clone() for name, p in ours.named_parameters()}
    matrices = [p for n, p in theirs.named_parameters() if n.startswith("layers.") and p.ndim == 2]
    rest = [p for n, p in theirs.named_parameters() if not (n.startswith("layers.") and p.ndim == 2)]
    # fused as ours is: torch's other kernels round differently on some processors
    reference = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [p for p in rest if p.ndim == 2], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        ),
        torch.optim.AdamW(
            [p for p in rest if p.ndim == 1], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        ),
    ]
    optimizers = build_optimizers(ours, OptimConfig(optimizer="muon", lr=0.01, muon_lr=0.02))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers + reference:
            optimizer.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if orthogonalise_in == torch.bfloat16 or not name.startswith("layers.") or a.ndim == 1:
            assert torch.equal(a, b), name
        else:
            # Eight bits through five quintic iterations: a few per cent of the way gone.
            assert (a - b).norm() < 0.05 * (b - start[name]).norm(), name


@pytest.mark.parametrize(
    "knobs", [{"optimizer": "adamw"}, {"optimizer": "muon"}, {"moments": "bf16"}], ids=str
)
def test_a_skipped_step_moves_nothing_and_is_not_counted(knobs: dict) -> None:
    """Three sound steps with a gradient of NaN between them are three sound steps, bit for bit."""
    runs = []
    for is_sound in ([True, True, True], [False, True, False, True, True, False]):
        model = small_model()
        optimizers = build_optimizers(model, OptimConfig(**knobs, lr=0.01, muon_lr=0.02))
        generator = torch.Generator().manual_seed(0)
        for sound in is_sound:
            for parameter in model.parameters():
                values = torch.randn(parameter.shape, generator=generator) if sound else torch.empty(())
                parameter.grad = values if sound else torch.full_like(parameter, torch.nan)
            step_all(optimizers, skipped=torch.tensor(0.0 if sound else 1.0))
            assert all(parameter.grad is None for parameter in model.parameters())
        state = [value for o in optimizers for slots in o.state.values() for value in slots.values()]
        runs.append([*model.parameters(), *state])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_whole_matrices_come_back_in_order_on_one_worker(tmp_path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        matrices = [torch.full((3, 2), 1.0), torch.full((2, 5), 2.0)]
        group = torch.distributed.group.WORLD
        results = map_whole_matrices(list(matrices), [m.shape for m in matrices], lambda m: m + len(m), group)
    finally:
        torch.distributed.destroy_process_group()
    assert [r.tolist() for r in results] == [(m + len(m)).tolist() for m in matrices]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"betas": (0.9,)}, r"betas must be \(float, float\), not \(0.9,\)"),
        ({"betas": 0.9}, r"betas must be \(float, float\), not 0.9"),
        ({"drops": (0.5, 0.5)}, r"drops\[0\] must be \(float, float\), not 0.5"),
        ({"drops": ((0.5, 0.5, 0.5),)}, r"drops\[0\] must be \(float, float\)"),
        ({"drops": [(0.5, -0.5)]}, "drops must be at least 0, not -0.5"),
    ],
)
def test_pairs_that_are_none_are_refused(changes, message):
    with pytest.raises(UserError, match=f"optim: {message}"):
        OptimConfig(**changes)
