"""Gauss-Newton products against dense float64 matrices, and what they must not touch."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CASES, block_diagonal, dense_ggn, make_case
from torch import Tensor, nn

import bdhf
from bdhf.curvature import GaussNewton, flattened
from bdhf.linearization import Linearizer
from bdhf.output_hessian import output_hessian, output_hessian_by_autograd
from bdhf.work import multiply_adds

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
MASK_SEED = 7
both_precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
every_network = pytest.mark.parametrize("name", CASES)


class Untraced(Linearizer):
    """Takes the plain path, as for a network that cannot be traced."""

    def _trace(self, *rest: Any) -> str:
        return "of a test"


both_paths = pytest.mark.parametrize("linearizer", [Linearizer, Untraced])


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def random_vector(model: nn.Module) -> list[Tensor]:
    return [torch.randn_like(p) for p in model.parameters() if p.requires_grad]


@both_precisions
@every_network
@pytest.mark.parametrize("blockwise", [False, True], ids=["whole", "blockwise"])
def test_reference_equals_dense_matrix(name: str, dtype: torch.dtype, blockwise: bool) -> None:
    exact, case = make_case(name, torch.float64), make_case(name, dtype)
    matrix = dense_ggn(exact, MASK_SEED)
    vector = random_vector(exact.model)
    expected = (block_diagonal(matrix, exact) if blockwise else matrix) @ flattened(
        vector, torch.float64
    )
    torch.manual_seed(MASK_SEED)
    product = bdhf.ggn_vector_product(
        case.model,
        case.criterion,
        case.batch,
        [v.to(dtype) for v in vector],
        blocks=case.blocks if blockwise else None,
    )
    assert [q.shape for q in product] == [v.shape for v in vector]
    assert relative_error(flattened(product, torch.float64), expected) < TOLERANCE[dtype]


@both_paths
@both_precisions
@every_network
def test_linearized_equals_dense_matrix_block_by_block(
    name: str, dtype: torch.dtype, linearizer: type[Linearizer]
) -> None:
    exact, case = make_case(name, torch.float64), make_case(name, dtype)
    matrix = block_diagonal(dense_ggn(exact, MASK_SEED), exact)
    torch.manual_seed(MASK_SEED)
    linearized = GaussNewton(
        case.model, case.criterion, case.batch, case.blocks, linearizer=linearizer()
    )
    path = "traced" if linearizer is Linearizer else "autograd: of a test"
    assert linearized.path == path
    trainable = [p for p in exact.model.parameters() if p.requires_grad]
    for k, block in enumerate(exact.blocks):
        tangents = {id(p): torch.randn_like(p) for p in block}
        vector = [tangents.get(id(p), torch.zeros_like(p)) for p in trainable]
        whole = matrix @ flattened(vector, torch.float64)
        parts = whole.split([p.numel() for p in trainable])
        pieces = dict(zip(map(id, trainable), parts, strict=True))
        expected = torch.cat([pieces[id(p)] for p in block])

        query: list[Tensor | None] = [None] * len(exact.blocks)
        query[k] = flattened([tangents[id(p)] for p in block], dtype)
        products = linearized.products(query)
        assert [q is None for q in products] == [v is None for v in query]
        found = products[k]
        assert found is not None
        assert relative_error(found.double(), expected) < TOLERANCE[dtype]


#: Whose loss is known to be a mean or a sum over rows that do not see each other.
CUT = (
    "tanh MLP, MSE mean",
    "tanh MLP, MSE sum",
    "tanh MLP, F.mse_loss",
    "cross-entropy mean",
    "cross-entropy sum, smoothed",
    "BCE with logits mean",
    "BCE with logits sum, weighted",
    "peephole LSTM",
    "residual CNN",
    "tied parameters",
    "frozen parameters",
    "attention",
)


@pytest.mark.parametrize("name", CUT)
def test_micro_batches_add_up_to_the_same_products(name: str) -> None:
    case = make_case(name, torch.float64)
    vectors = [torch.randn(sum(p.numel() for p in b)).double() for b in case.blocks]
    whole = GaussNewton(case.model, case.criterion, case.batch, case.blocks)
    cut = GaussNewton(case.model, case.criterion, case.batch, case.blocks, micro_batch=2)
    assert (whole.path, cut.path) == ("traced", "traced, in pieces")
    for one, other in zip(whole.products(vectors), cut.products(vectors), strict=True):
        assert one is not None and other is not None
        assert relative_error(other, one) < 1e-12


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_dropout_masks_are_the_same_in_all_products_and_the_random_stream_goes_on(
    micro_batch: int | None,
) -> None:
    case = make_case("dropout", torch.float64)
    linearized = GaussNewton(
        case.model, case.criterion, case.batch, case.blocks, micro_batch=micro_batch
    )
    vectors = [torch.randn(sum(p.numel() for p in b)).double() for b in case.blocks]
    first = linearized.products(vectors)
    torch.rand(3)
    again = linearized.products(vectors)
    for one, other in zip(first, again, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)
    vector = random_vector(case.model)
    state = torch.get_rng_state()
    bdhf.ggn_vector_product(case.model, case.criterion, case.batch, vector)
    assert torch.equal(torch.get_rng_state(), state)


def test_curvlinops_agrees() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    for name in (
        "tanh MLP, MSE mean",
        "cross-entropy mean",
        "residual CNN",
        "BCE with logits mean",
    ):
        case = make_case(name, torch.float64)
        inputs, targets = case.batch
        trainable = [p for p in case.model.parameters() if p.requires_grad]
        operator = curvlinops.GGNLinearOperator(
            case.model, case.criterion, trainable, [(inputs, targets)]
        )
        vector = random_vector(case.model)
        expected = operator @ flattened(vector, torch.float64)
        product = bdhf.ggn_vector_product(case.model, case.criterion, case.batch, vector)
        assert relative_error(flattened(product, torch.float64), expected) < 1e-10
        linearized = GaussNewton(case.model, case.criterion, case.batch, [trainable])
        (found,) = linearized.products([flattened(vector, torch.float64)])
        assert found is not None and relative_error(found, expected) < 1e-10


def test_a_block_is_charged_only_for_what_lies_above_it() -> None:
    """The counts of multiply-adds are those of the arithmetic (see docs of `GaussNewton`)."""
    widths = [6, 5, 4, 3]
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])
    rows = 7
    batch = torch.randn(rows, 6), torch.randn(rows, 3)
    blocks = [list(layer.parameters()) for layer in layers]
    linearized = GaussNewton(model, nn.MSELoss(), batch, blocks)
    cost = [2 * rows * a * b for a, b in itertools.pairwise(widths)]
    vectors = [torch.randn(sum(p.numel() for p in block)) for block in blocks]
    for k in range(3):
        query = [vectors[k] if j == k else None for j in range(3)]
        # Tangent and adjoint: the block's own layer once each, the layers above it once each.
        expected = 2 * cost[k] + 2 * sum(cost[k + 1 :])
        assert multiply_adds(lambda q=query: linearized.products(q)) == expected
    assert multiply_adds(lambda: linearized.products([None, None, None])) == 0


def test_convolutions_compute_no_result_that_is_not_asked_for() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.Tanh(), nn.Conv2d(3, 4, 1, bias=False))
    batch = torch.randn(5, 2, 6, 6), torch.randn(5, 4, 4, 4)
    blocks = [list(model[0].parameters()), list(model[2].parameters())]
    linearized = GaussNewton(model, nn.MSELoss(), batch, blocks)
    lower, upper = 2 * 5 * 16 * (2 * 3 * 9), 2 * 5 * 16 * (3 * 4)
    vectors = [torch.randn(54), torch.randn(12)]
    # Below a block there is nothing to do, and above it no gradient of a weight.
    assert multiply_adds(lambda: linearized.products([vectors[0], None])) == 2 * (lower + upper)
    assert multiply_adds(lambda: linearized.products([None, vectors[1]])) == 2 * upper


def test_products_run_no_forward_pass() -> None:
    case = make_case("tanh MLP, MSE mean", torch.float64)
    linearized = GaussNewton(case.model, case.criterion, case.batch, case.blocks)
    calls: list[object] = []
    for module in case.model.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    linearized.products([torch.randn(sum(p.numel() for p in b)).double() for b in case.blocks])
    assert not calls
    case.model(case.batch[0])
    assert calls  # the hooks do count


def test_buffers_gradients_and_training_mode_are_left_alone() -> None:
    case = make_case("batch norm", torch.float32)
    before = {n: b.clone() for n, b in case.model.named_buffers()}
    linearized = GaussNewton(case.model, case.criterion, case.batch, case.blocks)
    linearized.products([torch.randn(sum(p.numel() for p in b)) for b in case.blocks])
    bdhf.ggn_vector_product(case.model, case.criterion, case.batch, random_vector(case.model))
    assert all(torch.equal(b, before[n]) for n, b in case.model.named_buffers())
    assert all(p.grad is None for p in case.model.parameters())
    assert case.model.training


@pytest.mark.parametrize(
    "name",
    [
        "tanh MLP, MSE mean",
        "tanh MLP, F.mse_loss",
        "cross-entropy mean",
        "cross-entropy sum, smoothed",
        "cross-entropy, ignored targets",
        "BCE with logits mean",
    ],
)
def test_output_hessians_of_torchs_losses_need_no_autograd(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(name, torch.float64)
    outputs = case.model(case.batch[0]).detach()
    vector = torch.randn_like(outputs)
    (expected,) = output_hessian_by_autograd(case.criterion, outputs, case.batch[1])([vector])
    monkeypatch.setattr(torch.autograd, "grad", None)  # would fail if it were called
    (found,) = output_hessian(case.criterion, outputs, case.batch[1])([vector])
    assert relative_error(found, expected) < 1e-12


def test_half_precision_model_and_autocast_give_float32_products() -> None:
    exact = make_case("tanh MLP, MSE mean", torch.float32)
    half = make_case("tanh MLP, MSE mean", torch.bfloat16)
    half_weights = dict(half.model.state_dict())
    exact.model.load_state_dict(half_weights)  # the rounded weights, in float32
    exact.batch = tuple(t.float() for t in half.batch)
    vectors = [torch.randn(sum(p.numel() for p in b)) for b in exact.blocks]
    expected = GaussNewton(exact.model, nn.MSELoss(), exact.batch, exact.blocks).products(vectors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = GaussNewton(half.model, nn.MSELoss(), half.batch, half.blocks).products(vectors)
        cast = GaussNewton(exact.model, nn.MSELoss(), exact.batch, exact.blocks).products(vectors)
    for a, b, c in zip(expected, rounded, cast, strict=True):
        assert a is not None and b is not None and c is not None
        assert b.dtype == torch.float32 and relative_error(b, a) < 1e-5
        assert torch.equal(c, a)


def test_compiled_and_data_parallel_wrappers_are_seen_through() -> None:
    case = make_case("tanh MLP, MSE mean", torch.float64)
    vectors = [torch.randn(sum(p.numel() for p in b)).double() for b in case.blocks]
    expected = GaussNewton(case.model, case.criterion, case.batch, case.blocks).products(vectors)
    compiled = torch.compile(case.model, backend="eager")
    found = GaussNewton(compiled, case.criterion, case.batch, case.blocks).products(vectors)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_ddp_is_seen_through(tmp_path: Path) -> None:
    case = make_case("tanh MLP, MSE mean", torch.float32)
    vectors = [torch.randn(sum(p.numel() for p in b)) for b in case.blocks]
    expected = GaussNewton(case.model, case.criterion, case.batch, case.blocks).products(vectors)
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(case.model)
        opt = bdhf.BlockDiagonalHF([{"params": block} for block in case.blocks])
        found = GaussNewton(wrapped, case.criterion, case.batch, case.blocks).products(vectors)
        for _ in range(3):  # DDP's own bookkeeping is not disturbed between its backward passes
            opt.zero_grad()
            case.criterion(wrapped(case.batch[0]), case.batch[1]).backward()
            opt.step(wrapped, case.criterion, curvature_batch=case.batch)
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_reference_refuses_what_does_not_fit() -> None:
    case = make_case("tanh MLP, MSE mean", torch.float64)
    vector = random_vector(case.model)
    with pytest.raises(ValueError, match=r"vector has shapes .* trainable parameters have"):
        bdhf.ggn_vector_product(case.model, case.criterion, case.batch, vector[:-1])
    with pytest.raises(ValueError, match="not a trainable parameter of the model"):
        bdhf.ggn_vector_product(
            case.model, case.criterion, case.batch, vector, blocks=[[torch.zeros(2)]]
        )
    first = next(iter(case.model.parameters()))
    with pytest.raises(ValueError, match="blocks overlap; each parameter belongs to one block"):
        bdhf.ggn_vector_product(
            case.model, case.criterion, case.batch, vector, blocks=[[first], [first]]
        )
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        bdhf.ggn_vector_product(nn.Tanh(), case.criterion, case.batch, [])
    with pytest.raises(TypeError, match=r"batch is a Tensor; give a pair \(inputs, targets\)"):
        bdhf.ggn_vector_product(case.model, case.criterion, case.batch[0], vector)
    with pytest.raises(ValueError, match=r"criterion returned shape \(6, 3\); it must return a"):
        unreduced = nn.MSELoss(reduction="none")
        GaussNewton(case.model, unreduced, case.batch, case.blocks)
