"""A whole training step: equal to one device, bit for bit equal to the compiled module with torch.optim."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.utils._python_dispatch import TorchDispatchMode

import shardc
from shardc import FullyShard, Mesh, Plan, PlanError, Replicated, ShardingError, replicate
from tests.acceptance.models import MLP, MLP_TP, TRANSFORMER_TP, Transformer
from tests.runtime.ranks import on_ranks, run_ranks

PLAN = Plan(dp=Replicated(), tp=TRANSFORMER_TP)
ADAMW = functools.partial(torch.optim.AdamW, lr=1e-2)
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def loss_of(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def square(model: Any, x: Tensor) -> Tensor:
    return model(x).square().mean()


def pair(make: Any = Transformer) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = make().double()
    return model, copy.deepcopy(model)


def batches(steps: int = 3, rows: int = 4) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randint(16, (rows, 6), generator=draw), torch.randint(16, (rows, 6), generator=draw))] * steps


def train_alone(model: nn.Module, optimizer: Any, steps: Any, loss: Any = loss_of) -> list[Tensor]:
    losses, optim = [], optimizer(model.parameters())
    for batch in steps:
        losses.append(loss(model, *batch))
        losses[-1].backward()
        optim.step()
        optim.zero_grad()
    return [x.detach() for x in losses]


def check_equal(model: nn.Module, alone: nn.Module, **limits: Any) -> None:
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        have = p.full_tensor() if isinstance(p, DTensor) else p
        torch.testing.assert_close(have, q, **(limits or CLOSE), msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "optimizer",
    [
        functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
        functools.partial(torch.optim.AdamW, lr=1e-2, foreach=True),
        functools.partial(torch.optim.Adam, lr=1e-2, fused=True),
    ],
)
def test_three_steps_equal_one_device(optimizer: Any, accumulate: int):
    model, alone = pair()
    step = shardc.train_step(model, PLAN, loss_of, optimizer, mesh=Mesh(dp=2, tp=2), accumulate=accumulate)
    losses = [step(*batch) for batch in batches()]
    torch.testing.assert_close(losses, train_alone(alone, optimizer, batches()), **CLOSE)
    check_equal(step.model, alone)
    assert step.steps == 3 and len(step.programs) == 1
    assert all(p.grad is None for p in step.model.parameters())


def test_the_loss_is_the_programs_and_its_reductions_are_the_models():
    """Two scalars more than the model's own collectives: of the loss over dp, where its mean is taken."""
    step = shardc.train_step(pair()[0], PLAN, loss_of, ADAMW, mesh=Mesh(dp=2, tp=2))
    program = step.lower(*batches()[0])
    over_dp = [(c.kind, c.phase, c.numel) for c in program.collectives() if c.mesh_dim == "dp"]
    weights = sum(p.numel() for p in step.model.parameters())
    assert over_dp[0] == ("all_reduce", "forward", 2)
    (bucket,) = over_dp[1:]
    assert bucket[:2] == ("all_reduce", "backward") and bucket[2] < weights  # tp has split some of them


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip_norm", [0.01, 100.0])
def test_gradients_are_clipped_by_their_norm_over_all_ranks(clip_norm: float, accumulate: int):
    model, alone = pair()
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    plan = Plan(dp=FullyShard("layers.*"), tp=TRANSFORMER_TP)
    step = shardc.train_step(
        model, plan, loss_of, sgd, mesh=Mesh(dp=2, tp=2), clip_norm=clip_norm, accumulate=accumulate
    )
    optim = sgd(alone.parameters())
    for batch in batches(2):
        step(*batch)
        loss_of(alone, *batch).backward()
        nn.utils.clip_grad_norm_(alone.parameters(), clip_norm)
        optim.step()
        optim.zero_grad()
    check_equal(model, alone)


class Noisy(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, self.training))


def test_random_numbers_go_on_from_step_to_step_and_do_not_depend_on_the_mesh():
    losses = []
    for mesh in (Mesh(tp=1), Mesh(tp=2), Mesh(tp=4)):
        step = shardc.train_step(pair(Noisy)[0], MLP_TP, square, ADAMW, mesh=mesh)
        torch.manual_seed(5)
        x = torch.randn(4, 16, dtype=torch.double)
        losses.append(torch.stack([step(x) for _ in range(3)]))
        assert losses[-1].unique().numel() == 3
    torch.testing.assert_close(losses[1], losses[0], **CLOSE)
    torch.testing.assert_close(losses[2], losses[0], **CLOSE)


def test_annotations_of_the_model_are_its_plan():
    model, alone = pair(MLP)
    step = shardc.train_step(replicate(model), None, square, ADAMW, mesh=Mesh(dp=2))
    steps = [(torch.randn(4, 16, dtype=torch.double),)] * 2
    torch.testing.assert_close([step(*b) for b in steps], train_alone(alone, ADAMW, steps, square), **CLOSE)
    assert [c.kind for c in step.programs[0].collectives() if c.phase == "backward"] == ["all_reduce"]


class Dropped(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 1.0, self.training))


def test_the_mode_of_the_root_counts():
    model, alone = pair(Dropped)
    step = shardc.train_step(model, MLP_TP, square, functools.partial(torch.optim.SGD, lr=0.0), mesh=Mesh(tp=2))
    x = torch.randn(4, 16, dtype=torch.double)
    torch.testing.assert_close(step(x), square(alone, x))
    model.eval()
    assert not alone.eval().training
    torch.testing.assert_close(step(x), square(alone, x))
    assert model.training is False and len(step.programs) == 2


def test_a_parameter_without_a_gradient_stays_as_it_is():
    class Partly(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.frozen = nn.Linear(3, 3), nn.Parameter(torch.ones(16), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * self.frozen)

    model, alone = pair(Partly)
    step = shardc.train_step(model, MLP_TP, square, ADAMW, mesh=Mesh(tp=2))
    steps = [(torch.randn(4, 16, dtype=torch.double),)] * 2
    torch.testing.assert_close([step(*b) for b in steps], train_alone(alone, ADAMW, steps, square), **CLOSE)
    check_equal(model, alone)


def test_running_statistics_move_with_each_part_of_the_batch():
    model, alone = pair(lambda: nn.Sequential(nn.Linear(16, 4), nn.BatchNorm1d(4)))
    step = shardc.train_step(model, Plan(dp=Replicated()), square, ADAMW, mesh=Mesh(dp=2), accumulate=2)
    x = torch.randn(8, 16, dtype=torch.double)
    step(x)
    for part in x.chunk(2):
        square(alone, part)
    for (name, have), want in zip(model.named_buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(have, want, **CLOSE, msg=lambda text, n=name: f"{n}: {text}")


# --- state


def test_state_goes_on_where_it_was_saved_under_another_plan():
    (model, alone), (other, _) = pair(), pair()
    first = shardc.train_step(model, PLAN, loss_of, ADAMW, mesh=Mesh(dp=2, tp=2))
    second = shardc.train_step(other, Plan(dp=FullyShard()), loss_of, ADAMW, mesh=Mesh(dp=3))
    steps = batches(4, 6)
    losses = [first(*batch) for batch in steps[:2]]
    first.optimizer.param_groups[0]["lr"] = 1e-3
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    losses += [second(*batch) for batch in steps[2:]]
    assert second.steps == 4 and second.optimizer.param_groups[0]["lr"] == 1e-3
    optim = ADAMW(alone.parameters())
    for i, batch in enumerate(steps):
        optim.param_groups[0]["lr"] = 1e-2 if i < 2 else 1e-3
        loss = loss_of(alone, *batch)
        torch.testing.assert_close(losses[i], loss.detach(), **CLOSE)
        loss.backward()
        optim.step()
        optim.zero_grad()
    check_equal(second.model, alone)


def test_state_of_another_model_is_refused():
    step = shardc.train_step(MLP(), MLP_TP, square, ADAMW, mesh=Mesh(tp=2))
    step(torch.randn(4, 16))
    state = step.state_dict()
    state["optimizer"]["net9.weight"] = state["optimizer"].pop("net1.weight")
    with pytest.raises(PlanError, match="no place for the state of net9.weight"):
        step.load_state_dict(state)


# --- mistakes


def test_mistakes_are_refused_with_the_line():
    def made(loss: Any, **options: Any) -> Any:
        return shardc.train_step(MLP(), MLP_TP, loss, ADAMW, mesh=Mesh(tp=2), **options)

    x = torch.randn(6, 16)
    refused = {
        "loss_fn does not return one scalar tensor": lambda: made(lambda m, x: m(x))(x),
        "loss_fn does not return one scalar": lambda: made(lambda m, x: (m(x).sum(), m(x).mean()))(x),
        "the loss depends on no parameter": lambda: made(lambda m, x: m(x).detach().sum())(x),
        "accumulate": lambda: made(square, accumulate=0),
        "clip_norm": lambda: made(square, clip_norm=-1),
        "a batch of 6 rows is not 4 equal parts": lambda: made(square, accumulate=4)(x),
    }
    for message, call in refused.items():
        with pytest.raises((PlanError, ShardingError), match=message) as caught:
            call()
        assert "test_train_step.py:" in str(caught.value), caught.value


# --- real ranks


class OnDTensors(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def train_on_ranks(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    (model, alone), (other, _), (third, _) = (pair(lambda: MLP(16, 24)) for _ in range(3))
    place = mesh.get_local_rank("dp")
    plan = Plan(dp=FullyShard("net2"), tp=MLP_TP)
    step = shardc.train_step(model, plan, square, ADAMW, mesh=mesh)
    summed = shardc.train_step(third, plan, square, ADAMW, mesh=mesh, accumulate=2)
    # what the step does at once, in parts: the loss inside the program, autograd, torch.optim on DTensors
    prefixed = Plan(dp=FullyShard("model.net2"), tp={f"model.{name}": style for name, style in MLP_TP.items()})
    parts = shardc.compile(WithLoss(other), prefixed, mesh=mesh)
    optim = ADAMW(parts.parameters())
    steps = [(torch.randn(8, 16, dtype=torch.double, generator=torch.Generator().manual_seed(i)),) for i in range(3)]
    for i, (x,) in enumerate(steps):
        mine = x[4 * place :][:4]
        with OnDTensors() as watched:
            loss = step(mine)
        assert i == 0 or not watched.seen, watched.seen
        want = parts(mine)
        want.backward()
        optim.step()
        optim.zero_grad()
        assert torch.equal(loss, want), (loss, want)
        summed(mine)
    for p, q in zip(step.model.parameters(), other.parameters(), strict=True):
        assert torch.equal(*(x.full_tensor() if isinstance(x, DTensor) else x for x in (p, q)))  # pyright: ignore
    train_alone(alone, ADAMW, steps, square)
    check_equal(step.model, alone)
    check_equal(third, alone)
    state = step.state_dict()
    assert {type(s["exp_avg"]) for name, s in state["optimizer"].items() if "weight" in name} == {DTensor}


class WithLoss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return square(self.model, x)


@on_ranks
def test_on_four_ranks_a_step_is_bit_for_bit_its_parts_and_dispatches_on_no_dtensor():
    run_ranks(train_on_ranks, 4)


def test_a_checkpoint_of_a_step_goes_on_as_a_step_or_as_module_and_optimizer(tmp_path: Path):
    (model, _), (other, _), (third, _) = pair(), pair(), pair()
    step = shardc.train_step(model, PLAN, loss_of, ADAMW, mesh=Mesh(dp=2, tp=2))
    for batch in batches(4, 6)[:2]:
        step(*batch)
    shardc.save_checkpoint(tmp_path, step)
    later = [step(*batch) for batch in batches(4, 6)[2:]]
    again = shardc.train_step(other, Plan(dp=FullyShard()), loss_of, ADAMW, mesh=Mesh(dp=3))
    shardc.load_checkpoint(tmp_path, again)
    assert again.steps == 2
    torch.testing.assert_close([again(*batch) for batch in batches(4, 6)[2:]], later, **CLOSE)
    optim = ADAMW(third.parameters())
    shardc.load_checkpoint(tmp_path, third, optim)
    for batch, wanted in zip(batches(4, 6)[2:], later, strict=True):
        loss = loss_of(third, *batch)
        torch.testing.assert_close(loss.detach(), wanted, **CLOSE)
        loss.backward()
        optim.step()
        optim.zero_grad()
    shardc.save_checkpoint(tmp_path / "back", third, optim)
    shardc.load_checkpoint(tmp_path / "back", again)
    check_equal(again.model, third)


def lamb(parameters: Any) -> torch.optim.Optimizer:
    """As large-batch training writes it: a step is scaled by the norm of the whole matrix."""

    class Scaled(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for p in (p for group in self.param_groups for p in group["params"]):
                p -= 0.1 * p.grad * p.norm() / p.grad.norm()

    return Scaled(parameters)


WHOLE = {
    "muon": functools.partial(torch.optim.Muon, lr=0.1),
    "adafactor": functools.partial(torch.optim.Adafactor, lr=0.1),
    "lamb": lamb,
}
ELEMENT = {
    "adamw": functools.partial(torch.optim.AdamW, lr=1e-2),
    "sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "rprop": functools.partial(torch.optim.Rprop, lr=1e-2),
    "in groups": lambda ps: torch.optim.Adam([{"params": ps[:1], "lr": 0.1}, {"params": ps[1:]}], lr=1e-3),
}
MATRICES = nn.Sequential(nn.Linear(6, 7, bias=False), nn.Tanh(), nn.Linear(7, 6, bias=False))


def mean_square(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x).square().mean()


@pytest.mark.parametrize("plan", [FullyShard("*"), {"0": ColwiseParallel(), "2": RowwiseParallel()}])
@pytest.mark.parametrize("name", WHOLE)
def test_an_optimizer_that_looks_at_whole_parameters_is_refused_where_ranks_hold_pieces(name: str, plan: Any):
    with pytest.raises(PlanError, match="ranks hold pieces of 0.weight, 2.weight"):
        shardc.train_step(copy.deepcopy(MATRICES), plan, mean_square, WHOLE[name], mesh=Mesh(x=2))


@pytest.mark.parametrize(
    "name, plan", [*((name, Replicated()) for name in WHOLE), *((name, FullyShard("*")) for name in ELEMENT)]
)
def test_an_optimizer_steps_as_on_one_device(name: str, plan: Any):
    make, one, x = (WHOLE | ELEMENT)[name], copy.deepcopy(MATRICES), torch.randn(8, 6)
    step = shardc.train_step(copy.deepcopy(MATRICES), plan, mean_square, make, mesh=Mesh(x=2))
    optimizer = make(list(one.parameters()))
    for _ in range(3):
        optimizer.zero_grad()
        want = mean_square(one, x)
        want.backward()
        optimizer.step()
        torch.testing.assert_close(step(x), want.detach())
    torch.testing.assert_close(dict(step.model.named_parameters()), dict(one.named_parameters()))
