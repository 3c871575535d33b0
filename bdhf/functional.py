"""A network as a pure function: of its parameters, its buffers, its inputs and a random state."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from bdhf.batches import call_arguments
from bdhf.graphs import recording


def call(model: nn.Module, values: Mapping[Tensor, Tensor], inputs: Any) -> Any:
    """The model's outputs with other values for some of its parameters and buffers.

    Parameters without another value take part as they are; the model's own buffers do not move.
    """
    state = {}
    # Names are those of distinct modules: `functional_call` would tie weights by itself, but
    # leaves a module that is used in two places with the wrong parameters (torch 2.14).
    for prefix, module in model.named_modules():
        prefix = prefix + "." if prefix else ""
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            state[prefix + name] = values[parameter] if parameter in values else parameter.detach()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            state[prefix + name] = (values[buffer] if buffer in values else widened(buffer)).clone()
    args, kwargs = call_arguments(inputs)
    try:
        return functional_call(model, state, args, kwargs, tie_weights=False)
    finally:
        # Torch's recurrent modules list their weights a second time, and `functional_call` leaves
        # that list with the values of this call (torch 2.14); setting a weight renews it.
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                for name, parameter in module.named_parameters(recurse=False):
                    setattr(module, name, parameter)


@contextlib.contextmanager
def plain_operations(model: nn.Module) -> Iterator[None]:
    """No autocast, also in backward passes, and operations that can be differentiated twice."""
    device = next(model.parameters()).device.type
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(_switched_off(torch.backends.mkldnn))
            stack.enter_context(_switched_off(torch.backends.cudnn))
        yield


@contextlib.contextmanager
def _switched_off(backend: Any) -> Iterator[None]:
    """Not by the backend's own ``flags``, which also sets TF32, and fails where others have."""
    before = backend.enabled
    backend.enabled = False
    try:
        yield
    finally:
        backend.enabled = before


def widened(tensor: Tensor) -> Tensor:
    """``tensor`` in single precision if it is in half, else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def unwrapped(model: nn.Module) -> nn.Module:
    """The network itself: curvature needs no hooks of DDP's and no compiled backward pass."""
    inner = without_ddp(model)
    inner = getattr(inner, "_orig_mod", inner)  # torch.compile's
    return model if inner is model else unwrapped(inner)


def without_ddp(model: nn.Module) -> nn.Module:
    """The network that a DDP wrapper holds; any other as it is."""
    found: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    return found


@dataclass(frozen=True)
class RandomState:
    """The state of the random generators from which a network draws; None: it draws nothing."""

    cpu: Tensor | None
    device: torch.device
    of_device: Tensor | None

    @classmethod
    def capture(cls, tensors: Sequence[Tensor]) -> RandomState:
        """The current state of the CPU's generator and that of the tensors' device.

        None of it while work is recorded, which is only done where nothing is drawn.
        """
        device = tensors[0].device if tensors else torch.device("cpu")
        if recording():
            return cls(None, device, None)
        of_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), device, of_device)

    def equals(self, other: RandomState) -> bool:
        """Whether the same numbers will be drawn."""
        pairs = (self.cpu, other.cpu), (self.of_device, other.of_device)
        return all(one is two or torch.equal(one, two) for one, two in pairs)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw from this state inside, and go on from the current one afterwards."""
        if self.cpu is None:
            yield
            return
        with torch.random.fork_rng([] if self.of_device is None else [self.device]):
            torch.set_rng_state(self.cpu)
            if self.of_device is not None:
                torch.cuda.set_rng_state(self.of_device, self.device)
            yield


def other_generators() -> tuple[Any, Any]:
    """The state of Python's and NumPy's random generators."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return random.getstate(), None
    name, keys, *rest = numpy.random.get_state()
    return random.getstate(), (name, tuple(keys), *rest)


def restore_other_generators(state: tuple[Any, Any]) -> None:
    """Set them to what `other_generators` returned."""
    random.setstate(state[0])
    if state[1] is not None:
        sys.modules["numpy"].random.set_state(state[1])
