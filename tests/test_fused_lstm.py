"""The LSTM's kernels, in Triton's interpreter on a CPU; whether they compile for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_peephole_lstm import BLOCKS, SHAPES, layers_apart, network, plain_loop
from torch import Tensor, nn

import bdhf
from bdhf import fused_lstm
from bdhf.fused_lstm import FusedLSTM
from bdhf.linearization import AutogradLinearization

pytest.importorskip("triton", reason="Triton is not installed: it comes with torch on Linux")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels take any tensors, in Triton's interpreter (see conftest.py)."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: its tests run the kernels themselves")
    monkeypatch.setattr(fused_lstm, "usable", lambda sequences, units: True)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("inputs", "units", "layers", "time"), SHAPES)
def test_outputs_are_those_of_the_plain_loop(
    inputs: int, units: int, layers: int, time: int
) -> None:
    model = network(inputs, units, layers)
    sequences = torch.randn(5, time, inputs).double()
    expected = torch.stack([plain_loop(model, sequence) for sequence in sequences])
    with torch.no_grad():
        linearized = model.linearize([], sequences)
        assert isinstance(linearized, FusedLSTM)
        found = [model(sequences), linearized.outputs]
    torch.testing.assert_close(found, [expected.detach()] * 2, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("inputs", "units", "rows"), [(1, 4, 6), (5, 3, 33), (2, 17, 3)])
@pytest.mark.parametrize("name", BLOCKS)
def test_maps_are_those_of_autograd(name: str, inputs: int, units: int, rows: int) -> None:
    """For batches below and above a program's tile, units that need a larger one."""
    model = network(inputs, units, layers=3)
    blocks = BLOCKS[name](model)
    sequences = torch.randn(rows, 4, inputs).double()
    with torch.no_grad():
        own = model.linearize(blocks, sequences)
    assert isinstance(own, FusedLSTM)
    reference = AutogradLinearization.of(model, blocks, sequences)
    for stopped in (None, 0):
        directions = [[torch.randn_like(p) for p in block] for block in blocks]
        cotangents = [[torch.randn_like(own.outputs)] for _ in blocks]
        if stopped is not None:
            directions[stopped] = cotangents[stopped] = None
        with torch.no_grad():
            found = [own.tangents(directions), own.adjoints(cotangents)]
        expected = [reference.tangents(directions), reference.adjoints(cotangents)]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # infinity is right there
@pytest.mark.parametrize(("scale", "atol"), [(1e-3, 1e-10), (1.0, 1e-7), (30.0, 2e-5)])
def test_in_single_precision_gates_keep_their_digits(scale: float, atol: float) -> None:
    """Near zero, where an exponential's would cancel, and far from it, where it overflows."""
    model = network(2, 4, 2).float()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
        sequences = torch.randn(4, 6, 2)
        found = model.linearize([list(model.parameters())], sequences).layers[-1]
        exact = model.double().linearize([], sequences.double()).layers[-1]
    for own, right in zip((*found.slopes, found.cell), (*exact.slopes, exact.cell), strict=True):
        torch.testing.assert_close(own.double(), right, rtol=2e-6, atol=atol)


@pytest.mark.usefixtures("interpreted")
def test_updates_are_those_of_the_wavefront(monkeypatch: pytest.MonkeyPatch) -> None:
    weights: list[Tensor] = []
    paths: list[str] = []
    for fused in (True, False):
        monkeypatch.setattr(fused_lstm, "usable", lambda sequences, units, fused=fused: fused)
        model = network(1, 4, 3)
        torch.manual_seed(1)
        opt = bdhf.BlockDiagonalHF(
            [{"params": block} for block in layers_apart(model)], damping=0.01, cg_max_iter=5
        )
        for _ in range(3):
            batch = torch.randn(6, 5, 1).double(), torch.randint(4, (6,))
            opt.step(model, nn.CrossEntropyLoss(), batch)
        weights.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
        assert opt.last_step is not None
        paths.append(opt.last_step.path)
    torch.testing.assert_close(*weights, rtol=1e-8, atol=1e-9)
    assert paths == ["brought by the network"] * 2


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "alter",
    [
        lambda model: setattr(model, "readout", nn.Sequential(model.readout, nn.Tanh())),
        lambda model: setattr(model, "readout", nn.Linear(4, 4, bias=False).double()),
    ],
)
def test_an_altered_network_goes_without(alter: Any) -> None:
    model = network(1, 4, 2)
    alter(model)
    sequences = torch.randn(6, 5, 1).double()
    expected = model(sequences).detach()
    with torch.no_grad():
        assert torch.equal(model(sequences), expected)
        assert model.linearize([list(model.parameters())], sequences) is None


def test_kernels_are_for_single_precision_on_a_gpu() -> None:
    assert not fused_lstm.usable(torch.zeros(2, 3, 1), 10)
    if torch.cuda.is_available():
        sequences = torch.zeros(2, 3, 1, device="cuda")
        assert fused_lstm.usable(sequences, 10)
        assert not fused_lstm.usable(sequences.double(), 10)
        assert not fused_lstm.usable(sequences, 65)


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bdhf import peephole_kernels as kernels

units, capability = map(int, sys.argv[1:])
for name in ("_forward", "_tangent", "_adjoint"):
    kernel = getattr(kernels, name)
    fixed = {"units": units, "padded": max(16, units), "tile": kernels._TILE, "slopes": True}
    kinds = {"steps": "i32", "rows": "i32", **dict.fromkeys(fixed, "constexpr")}
    source = ASTSource(
        fn=kernel,
        signature={argument: kinds.get(argument, "*fp32") for argument in kernel.arg_names},
        constexprs={(k,): fixed[a] for k, a in enumerate(kernel.arg_names) if a in fixed},
    )
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options={"num_warps": kernels._WARPS})
    shared = made.metadata.shared <= 99 * 1024  # what any GPU since Ampere has
    print(name, len(made.asm["cubin"]) > 1000, "tf32" in made.asm["ptx"], shared)
"""


@pytest.mark.parametrize(("units", "capability"), [(10, 80), (10, 90), (32, 80)])
def test_kernels_compile_for_gpus(units: int, capability: int, tmp_path: Path) -> None:
    """Down to machine code, in full precision, by Triton's own assembler, which needs no GPU."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    arguments = [sys.executable, "-c", COMPILE, str(units), str(capability)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    expected = [f"{name} True False True" for name in ("_forward", "_tangent", "_adjoint")]
    assert done.stdout.splitlines() == expected, done.stderr
