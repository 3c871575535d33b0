"""BlockDiagonalHF against a loop written from the reference pieces, and as a torch optimizer."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from networks import Case, make_case
from torch import Tensor, nn

import bdhf
from bdhf.curvature import flattened, unflattened

SETTINGS = {"lr": 0.5, "damping": 1.0, "cg_max_iter": 6, "cg_tol": 5e-4, "cg_momentum": 0.95}


def groups_of(case: Case) -> list[dict[str, Any]]:
    return [{"params": block} for block in case.blocks]


def first_rows(batch: tuple[Tensor, Tensor], rows: int) -> tuple[Tensor, Tensor]:
    return batch[0][:rows], batch[1][:rows]


def reference_updates(
    case: Case, updates: int, rows: int, settings: list[dict[str, Any]], clip: float | None = None
) -> None:
    """Block-diagonal HF as the paper describes it, from the plain pieces only."""
    trainable = [p for p in case.model.parameters() if p.requires_grad]
    last: list[Tensor | None] = [None] * len(case.blocks)
    for update in range(updates):
        torch.manual_seed(update)
        state = torch.get_rng_state()
        loss = case.criterion(case.model(case.batch[0]), case.batch[1])
        gradients = torch.autograd.grad(loss, trainable, materialize_grads=True)
        if clip is not None:
            norm = torch.cat([g.reshape(-1) for g in gradients]).norm()
            gradients = tuple(g * torch.clamp(clip / (norm + 1e-6), max=1.0) for g in gradients)
        gradient = {id(p): g for p, g in zip(trainable, gradients, strict=True)}
        torch.set_rng_state(state)
        few = first_rows(case.batch, rows)
        for k, (block, setting) in enumerate(zip(case.blocks, settings, strict=True)):

            def matvec(
                vector: Tensor, block: Any = block, setting: Any = setting, few: Any = few
            ) -> Tensor:
                parts = {id(p): v for p, v in zip(block, unflattened(vector, block), strict=True)}
                padded = [parts.get(id(p), torch.zeros_like(p)) for p in trainable]
                product = bdhf.ggn_vector_product(
                    case.model, case.criterion, few, padded, blocks=[block]
                )
                of = {id(p): q for p, q in zip(trainable, product, strict=True)}
                return flattened([of[id(p)] for p in block], vector.dtype) + (
                    setting["damping"] * vector
                )

            b = -flattened([gradient[id(p)] for p in block], torch.float64)
            start = last[k]
            warm = None if start is None else setting["cg_momentum"] * start
            last[k] = bdhf.conjugate_gradient(
                matvec, b, warm, max_iter=setting["cg_max_iter"], tol=setting["cg_tol"]
            ).solution
        with torch.no_grad():
            for block, solution, setting in zip(case.blocks, last, settings, strict=True):
                assert solution is not None
                for p, change in zip(block, unflattened(solution, block), strict=True):
                    p.add_(setting["lr"] * change)


def assert_same_weights(one: nn.Module, other: nn.Module, tolerance: float = 1e-12) -> None:
    p, q = (torch.cat([p.detach().reshape(-1) for p in m.parameters()]) for m in (one, other))
    error = float((p - q).norm() / p.norm())
    assert error <= tolerance, f"relative difference {error:.1e}"


NETWORKS = (
    "tanh MLP, MSE mean",
    "cross-entropy mean",
    "BCE with logits mean",
    "peephole LSTM",
    "residual CNN",
    "tied parameters",
    "frozen parameters",
    "parameters in no block",
    "convex loss of one's own",
    "dropout",
)


@pytest.mark.parametrize("rows", [None, 3], ids=["full curvature batch", "smaller"])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_a_loop_over_the_reference(name: str, rows: int | None) -> None:
    expected, case = make_case(name, torch.float64), make_case(name, torch.float64)
    opt = bdhf.BlockDiagonalHF(groups_of(case), **SETTINGS)
    curvature_batch = None if rows is None else first_rows(case.batch, rows)
    for update in range(4):
        torch.manual_seed(update)
        opt.step(case.model, case.criterion, case.batch, curvature_batch)
    count = len(case.batch[1]) if rows is None else rows
    reference_updates(expected, 4, count, [SETTINGS] * len(case.blocks))
    assert_same_weights(expected.model, case.model)


def test_every_setting_acts_per_group() -> None:
    # With many iterations and little damping, the tolerance has something to cut short.
    common = {**SETTINGS, "cg_max_iter": 30, "damping": 0.1}
    changes = {"lr": 0.25, "damping": 0.5, "cg_max_iter": 2, "cg_tol": 0.5, "cg_momentum": 0.0}
    results = []
    for name, value in [("lr", common["lr"]), *changes.items()]:
        expected, case = (make_case("tanh MLP, MSE mean", torch.float64) for _ in range(2))
        first = {**common, name: value}
        groups = [{"params": case.blocks[0], **first}, {"params": case.blocks[1]}]
        opt = bdhf.BlockDiagonalHF(groups, **common)
        for _ in range(3):
            opt.step(case.model, case.criterion, case.batch)
        reference_updates(expected, 3, 6, [first, common])
        assert_same_weights(expected.model, case.model, tolerance=1e-8)
        results.append(torch.cat([p.reshape(-1) for p in case.model.parameters()]).clone())
    for one, other in itertools.combinations(results, 2):
        assert not torch.equal(one, other)


@pytest.mark.parametrize("micro_batch", [1, 4, 5, 6, 100])
def test_micro_batch_gives_equal_updates(micro_batch: int) -> None:
    whole, cut = (make_case("cross-entropy mean", torch.float64) for _ in range(2))
    opts = [bdhf.BlockDiagonalHF(groups_of(case), **SETTINGS) for case in (whole, cut)]
    for _ in range(3):
        few = first_rows(whole.batch, 4)
        expected = opts[0].step(whole.model, whole.criterion, whole.batch, few)
        loss = opts[1].step(cut.model, cut.criterion, cut.batch, few, micro_batch=micro_batch)
        assert torch.allclose(loss, expected, rtol=1e-13)
    assert_same_weights(whole.model, cut.model)
    assert opts[1].last_step is not None
    assert opts[1].last_step.path == ("traced" if micro_batch >= 4 else "traced, in pieces")


def test_gradients_found_in_p_grad_are_used() -> None:
    expected, case = (make_case("cross-entropy mean", torch.float64) for _ in range(2))
    opt = bdhf.BlockDiagonalHF(groups_of(case), **SETTINGS)
    for _ in range(3):
        opt.zero_grad()
        case.criterion(case.model(case.batch[0]), case.batch[1]).backward()
        nn.utils.clip_grad_norm_(case.model.parameters(), 0.1)
        assert opt.step(case.model, case.criterion, curvature_batch=case.batch) is None
    reference_updates(expected, 3, 6, [SETTINGS] * 2, clip=0.1)
    assert_same_weights(expected.model, case.model)


def test_one_step_solves_least_squares() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(40, 6, dtype=torch.float64)
    targets = torch.randn(40, 1, dtype=torch.float64)
    model = nn.Linear(6, 1, bias=False).double()
    opt = bdhf.BlockDiagonalHF(model.parameters(), lr=1.0, cg_max_iter=50, cg_tol=0.0)
    loss = opt.step(model, nn.MSELoss(), (inputs, targets))
    solution = torch.linalg.lstsq(inputs, targets).solution
    assert torch.allclose(model.weight.T, solution, rtol=1e-10, atol=1e-12)
    assert loss is not None and not loss.requires_grad


def test_returned_loss_gradient_and_report() -> None:
    case = make_case("cross-entropy mean", torch.float64)
    expected = case.criterion(case.model(case.batch[0]), case.batch[1])
    gradients = torch.autograd.grad(expected, list(case.model.parameters()))
    stale = [torch.full_like(p, 9.0) for p in case.model.parameters()]
    for p, g in zip(case.model.parameters(), stale, strict=True):
        p.grad = g
    opt = bdhf.BlockDiagonalHF(groups_of(case), **SETTINGS)
    assert opt.last_step is None
    loss = opt.step(case.model, case.criterion, case.batch)
    assert torch.equal(loss, expected.detach())
    for p, g in zip(case.model.parameters(), gradients, strict=True):
        assert p.grad is not None and torch.equal(p.grad, g)
    report = opt.last_step
    assert report is not None and report.path == "traced"
    norm = torch.cat([g.reshape(-1) for g in gradients]).norm()
    assert torch.allclose(report.gradient_norm, norm, rtol=1e-12)
    assert [b.reason for b in report.blocks] == ["iteration cap"] * 2
    assert [b.iterations for b in report.blocks] == [6, 6]
    assert [b.products for b in report.blocks] == [6, 6] and report.products == 12
    assert all(b.value < 0 for b in report.blocks)
    opt.step(case.model, case.criterion, case.batch)
    assert opt.last_step is not None
    assert [b.products for b in opt.last_step.blocks] == [7, 7]  # one more: the warm start


def test_value_predicts_the_change_of_a_quadratic_loss() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 2).double()
    batch = torch.randn(20, 5).double(), torch.randn(20, 2).double()
    opt = bdhf.BlockDiagonalHF(model.parameters(), lr=1.0, cg_max_iter=4, cg_tol=0.0)
    before = opt.step(model, nn.MSELoss(), batch)
    after = nn.MSELoss()(model(batch[0]), batch[1])
    assert opt.last_step is not None and before is not None
    assert (after - before).item() == pytest.approx(opt.last_step.blocks[0].value, rel=1e-10)


def test_buffers_move_once_in_the_gradient_pass() -> None:
    expected, case = (make_case("batch norm", torch.float64) for _ in range(2))
    opt = bdhf.BlockDiagonalHF(groups_of(case), **SETTINGS)
    opt.step(case.model, case.criterion, case.batch)
    expected.model(expected.batch[0])
    for one, other in zip(expected.model.buffers(), case.model.buffers(), strict=True):
        assert torch.equal(one, other)
    opt.step(case.model, case.criterion, curvature_batch=case.batch)
    assert int(case.model[1].num_batches_tracked) == 1


def test_dropout_draws_from_the_random_stream_as_one_forward_pass_does() -> None:
    case = make_case("dropout", torch.float64)
    torch.manual_seed(3)
    case.model(case.batch[0])
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    bdhf.BlockDiagonalHF(groups_of(case), **SETTINGS).step(case.model, case.criterion, case.batch)
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_state_dict_round_trip_continues_exactly(dtype: torch.dtype, tmp_path: Any) -> None:
    case = make_case("peephole LSTM", dtype)
    opt = bdhf.BlockDiagonalHF(groups_of(case), **SETTINGS)

    def step(case: Case, opt: bdhf.BlockDiagonalHF) -> None:
        opt.step(case.model, case.criterion, case.batch, first_rows(case.batch, 3))

    for _ in range(2):
        step(case, opt)
    torch.save((case.model.state_dict(), opt.state_dict()), tmp_path / "state.pt")
    other = make_case("peephole LSTM", dtype, seed=9)
    other.batch = case.batch
    resumed = bdhf.BlockDiagonalHF(groups_of(other), lr=99.0)
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    other.model.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["lr"] == 0.5 and resumed.param_groups[0]["damping"] == 1.0
    for _ in range(3):
        step(case, opt)
        step(other, resumed)
    assert all(
        torch.equal(p, q)
        for p, q in zip(case.model.parameters(), other.model.parameters(), strict=True)
    )


def test_loading_casts_the_warm_start() -> None:
    case = make_case("cross-entropy mean", torch.float64)
    opt = bdhf.BlockDiagonalHF(groups_of(case), **SETTINGS)
    opt.step(case.model, case.criterion, case.batch)
    single = make_case("cross-entropy mean", torch.float32)
    loaded = bdhf.BlockDiagonalHF(groups_of(single), **SETTINGS)
    loaded.load_state_dict(opt.state_dict())
    assert all(s["cg_solution"].dtype == torch.float32 for s in loaded.state.values())
    loaded.step(single.model, single.criterion, single.batch)
    assert loaded.last_step is not None
    assert all(b.products == b.iterations + 1 for b in loaded.last_step.blocks)  # a warm start


def test_copies_and_pickles_continue_exactly() -> None:
    case = make_case("cross-entropy mean", torch.float64)
    opt = bdhf.BlockDiagonalHF(groups_of(case), **SETTINGS)
    opt.step(case.model, case.criterion, case.batch)
    model, twin = copy.deepcopy((case.model, opt))
    assert twin.last_step is None
    opt.step(case.model, case.criterion, case.batch)
    twin.step(model, case.criterion, case.batch)
    assert_same_weights(case.model, model, tolerance=0.0)


def test_scheduler_acts() -> None:
    case = make_case("cross-entropy mean", torch.float64)
    opt = bdhf.BlockDiagonalHF(groups_of(case), **SETTINGS)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.0)
    opt.step(case.model, case.criterion, case.batch)
    scheduler.step()
    before = copy.deepcopy(case.model)
    opt.step(case.model, case.criterion, case.batch)
    assert_same_weights(before, case.model, tolerance=0.0)  # lr is 0 now


def test_plain_iterable_is_one_block_and_that_is_hf() -> None:
    expected, case = (make_case("cross-entropy mean", torch.float64) for _ in range(2))
    opt = bdhf.BlockDiagonalHF(case.model.parameters(), **SETTINGS)
    opt.step(case.model, case.criterion, case.batch)
    expected.blocks = [[p for block in expected.blocks for p in block]]
    reference_updates(expected, 1, 6, [SETTINGS])
    assert_same_weights(expected.model, case.model)
    assert opt.last_step is not None and len(opt.last_step.blocks) == 1


def test_parameter_frozen_later_is_left_out() -> None:
    case = make_case("cross-entropy mean", torch.float64)
    opt = bdhf.BlockDiagonalHF(groups_of(case), **SETTINGS)
    opt.step(case.model, case.criterion, case.batch)
    case.blocks[0][0].requires_grad_(False)
    before = case.blocks[0][0].clone()
    opt.step(case.model, case.criterion, case.batch)
    assert torch.equal(case.blocks[0][0], before)
    case.blocks[0][0].requires_grad_(True)
    opt.step(case.model, case.criterion, case.batch)
    assert not torch.equal(case.blocks[0][0], before)


def test_frozen_group_keeps_its_place_in_the_report() -> None:
    case = make_case("cross-entropy mean", torch.float64)
    opt = bdhf.BlockDiagonalHF(groups_of(case), **SETTINGS)
    for p in case.blocks[0]:
        p.requires_grad_(False)
    opt.step(case.model, case.criterion, case.batch)
    assert opt.last_step is not None
    assert [b.iterations for b in opt.last_step.blocks] == [0, 6]


def test_half_precision_model_is_solved_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Class weights included, which are half precision too."""
    case = make_case("cross-entropy, class weights", torch.bfloat16)
    seen: list[torch.dtype] = []
    solve = bdhf.update.Systems

    def spy(b: Any, *rest: Any, **settings: Any) -> Any:
        seen.extend(vector.dtype for vector in b)
        return solve(b, *rest, **settings)

    monkeypatch.setattr(bdhf.update, "Systems", spy)
    opt = bdhf.BlockDiagonalHF(groups_of(case), **SETTINGS)
    before = [p.clone() for p in case.model.parameters()]
    opt.step(case.model, case.criterion, case.batch)
    assert seen == [torch.float32] * 2
    assert case.criterion.weight.dtype == torch.bfloat16
    assert not any(torch.equal(p, q) for p, q in zip(before, case.model.parameters(), strict=True))


def test_sparse_gradients_of_an_embedding() -> None:
    weights = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(6, 3, sparse=sparse), nn.Flatten(), nn.Linear(6, 2))
        inputs, targets = torch.randint(6, (5, 2)), torch.randint(2, (5,))
        bdhf.gradient.loss_and_gradient(
            model, nn.CrossEntropyLoss(), (inputs, targets), list(model.parameters())
        )
        weights.append(model[0].weight.grad)
    assert torch.equal(*weights)


def test_torchs_own_lstm_and_empty_batches() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.readout = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.readout(self.lstm(x)[0][:, -1])

    model, loss = Reader(), nn.CrossEntropyLoss()
    batch = torch.randn(5, 4, 2), torch.randint(2, (5,))
    vector = [torch.randn_like(p) for p in model.parameters()]
    product = bdhf.ggn_vector_product(model, loss, batch, vector)
    matrix = bdhf.curvature.GaussNewton(model, loss, batch, [list(model.parameters())])
    (found,) = matrix.products([flattened(vector, torch.float32)])
    assert torch.allclose(found, flattened(product, torch.float32), rtol=1e-3, atol=1e-6)
    opt = bdhf.BlockDiagonalHF(model.parameters())
    with pytest.raises(ValueError, match="^batch is empty; give at least one row"):
        opt.step(model, loss, (batch[0][:0], batch[1][:0]), micro_batch=2)
    with pytest.raises(ValueError, match="^curvature_batch is empty; give at least one row"):
        opt.step(model, loss, batch, (batch[0][:0], batch[1][:0]))


def test_inputs_may_be_a_tuple_or_a_dict() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.layer(a - 2 * b)

    torch.manual_seed(0)
    model = Sum()
    a, b, targets = torch.randn(5, 3), torch.randn(5, 3), torch.randn(5, 2)
    weights = []
    for inputs in ((a, b), {"b": b, "a": a}):
        twin = copy.deepcopy(model)
        opt = bdhf.BlockDiagonalHF(twin.parameters())
        opt.step(twin, nn.MSELoss(), (inputs, targets))
        weights.append(twin.layer.weight)
    assert torch.equal(*weights) and not torch.equal(weights[0], model.layer.weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -0.1}, r"lr=-0.1; must be 0 or more and finite"),
        ({"lr": float("nan")}, r"lr=nan; must be 0 or more and finite"),
        ({"lr": "0.1"}, r"lr='0.1'; must be a number, 0 or more"),
        ({"lr": None}, r"lr=None; must be a number, 0 or more"),
        ({"damping": True}, r"damping=True; must be a number, 0 or more"),
        ({"damping": -1}, r"damping=-1; must be 0 or more and finite"),
        ({"damping": float("inf")}, r"damping=inf; must be 0 or more and finite"),
        ({"cg_max_iter": 0}, r"cg_max_iter=0; must be 1 or more and finite"),
        ({"cg_max_iter": 2.5}, r"cg_max_iter=2.5; must be a whole number, 1 or more"),
        ({"cg_max_iter": True}, r"cg_max_iter=True; must be a whole number"),
        ({"cg_tol": -1e-3}, r"cg_tol=-0.001; must be 0 or more and finite"),
        ({"cg_momentum": 1.5}, r"cg_momentum=1.5; must be from 0 to 1"),
    ],
)
@pytest.mark.parametrize("where", ["constructor", "group"])
def test_settings_out_of_range_are_refused(
    settings: dict[str, Any], message: str, where: str
) -> None:
    parameters = [nn.Parameter(torch.zeros(2))]
    with pytest.raises(ValueError, match=message):
        if where == "constructor":
            bdhf.BlockDiagonalHF(parameters, **settings)
        else:
            bdhf.BlockDiagonalHF([{"params": parameters, **settings}])


def linear_case() -> tuple[nn.Module, bdhf.BlockDiagonalHF, tuple[Tensor, Tensor]]:
    model = nn.Linear(3, 2)
    return model, bdhf.BlockDiagonalHF(model.parameters()), (torch.randn(4, 3), torch.randn(4, 2))


def test_refusals_of_step() -> None:
    model, opt, batch = linear_case()
    loss = nn.MSELoss()
    with pytest.raises(TypeError, match=r"got a function as model; step\(\) takes no closure: it"):
        opt.step(lambda: loss(model(batch[0]), batch[1]))
    with pytest.raises(TypeError, match=r"got a function as model; step\(\) takes no closure: it"):
        opt.step(model, loss, batch, closure=lambda: loss(model(batch[0]), batch[1]))
    with pytest.raises(TypeError, match=r"takes no closure"):
        opt.step(closure=lambda: loss(model(batch[0]), batch[1]))
    with pytest.raises(
        TypeError, match=r"criterion is the class MSELoss; give a loss: MSELoss\(\)"
    ):
        opt.step(model, nn.MSELoss, batch)
    with pytest.raises(TypeError, match=r"got a NoneType as model\. Call it as opt\.step\(model"):
        opt.step(None)
    with pytest.raises(ValueError, match=r"step\(\) needs a criterion"):
        opt.step(model, batch=batch)
    with pytest.raises(ValueError, match="batch=None uses the gradients in p.grad and then needs"):
        opt.step(model, loss)
    with pytest.raises(ValueError, match=r"there are none; call loss\.backward\(\) first"):
        opt.step(model, loss, curvature_batch=batch)
    with pytest.raises(TypeError, match=r"^batch is a Tensor; give a pair \(inputs, targets\)"):
        opt.step(model, loss, batch[0])
    with pytest.raises(TypeError, match=r"^curvature_batch is a Tensor; give a pair"):
        opt.step(model, loss, batch, batch[0])
    with pytest.raises(ValueError, match=r"param group 0 holds a parameter of shape \(2, 3\) that"):
        opt.step(nn.Linear(3, 2), loss, batch)
    with pytest.raises(ValueError, match=r"criterion returned shape \(4, 2\); it must return a sc"):
        opt.step(model, nn.MSELoss(reduction="none"), batch)
    for size in (0, 2.5):
        with pytest.raises(ValueError, match=f"micro_batch={size}; must be 1 or more, or None"):
            opt.step(model, loss, batch, micro_batch=size)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter in the param groups requires a gradient"):
        opt.step(model, loss, batch)


def test_refused_batch_changes_nothing() -> None:
    case = make_case("batch norm", torch.float64)
    opt = bdhf.BlockDiagonalHF(groups_of(case))
    with pytest.raises(TypeError, match="curvature_batch is a Tensor"):
        opt.step(case.model, case.criterion, case.batch, case.batch[0])
    assert case.model[1].num_batches_tracked == 0
    assert all(p.grad is None for p in case.model.parameters())


def test_refused_step_changes_nothing() -> None:
    model, opt, batch = linear_case()
    before = copy.deepcopy(model.state_dict())
    for bad in (nn.MSELoss(reduction="none"), lambda o, t: "loss"):
        with pytest.raises(ValueError, match="criterion returned"):
            opt.step(model, bad, batch)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not opt.state and opt.last_step is None


def test_complex_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype torch.complex64; BlockDiagonalHF needs real"):
        bdhf.BlockDiagonalHF([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cross-entropy, class weights", "class weights under reduction='mean': the pieces"),
        ("cross-entropy, ignored targets", "targets equal to ignore_index=-100 under"),
        ("convex loss of one's own", "needs a criterion whose `reduction` is 'mean' or 'sum'"),
        ("batch norm", r"micro_batch with batch norm in training \(1\): its statistics"),
    ],
)
def test_micro_batch_that_would_change_the_result_is_refused(name: str, message: str) -> None:
    case = make_case(name, torch.float64)
    opt = bdhf.BlockDiagonalHF(groups_of(case))
    with pytest.raises(ValueError, match=message):
        opt.step(case.model, case.criterion, case.batch, micro_batch=2)
    opt.step(case.model, case.criterion, case.batch)  # without it, nothing is wrong


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_gradients_that_autograd_shares_are_kept_apart(micro_batch: int | None) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.b, self.c, self.p = (nn.Parameter(torch.randn(3)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + (self.b + self.c) + self.p.sum()

    model, batch = Sum(), (torch.randn(6, 4), torch.randn(6, 3))
    loss = nn.functional.mse_loss(model(batch[0]), batch[1])
    expected = torch.autograd.grad(loss, list(model.parameters()))
    opt = bdhf.BlockDiagonalHF(model.parameters(), damping=1.0)
    opt.step(model, nn.MSELoss(), batch, micro_batch=micro_batch)
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    model.b.grad.zero_()
    assert model.c.grad.abs().sum() > 0


def test_micro_batch_with_batch_norm_in_evaluation_is_accepted() -> None:
    whole, cut = (make_case("batch norm", torch.float64) for _ in range(2))
    for case, micro_batch in ((whole, None), (cut, 2)):
        case.model.eval()
        opt = bdhf.BlockDiagonalHF(groups_of(case), **SETTINGS)
        opt.step(case.model, case.criterion, case.batch, micro_batch=micro_batch)
    assert_same_weights(whole.model, cut.model)
