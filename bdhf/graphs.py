"""Work on a GPU recorded once and replayed, as CUDA graphs: no Python, one launch.

An update of a small network is thousands of kernels of a few microseconds each, and issuing them
from Python takes longer than running them. A recorded piece of work reads and writes the same
memory at every replay, so its inputs are copied there, and what it leaves is read from there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from bdhf.batches import Criterion
from bdhf.tracing import strided_copy

_Made = TypeVar("_Made")

#: Times that work is done as usual before it is recorded: libraries set themselves up in it.
WARM_UP = 2

_recording = False


class NoGraphError(Exception):
    """Why some work cannot be recorded."""


def recording() -> bool:
    """Whether work is being recorded: nothing may be kept that a replay would not make anew."""
    return _recording


def available(device: torch.device) -> bool:
    """Whether work on ``device`` can be recorded."""
    return device.type == "cuda"


def record(work: Callable[[], None], pool: Any, device: torch.device) -> Callable[[], None]:
    """What replays ``work``, which is not done yet; memory comes from ``pool``."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=pool):
                work()
        except Exception:
            # Torch leaves its stream in place then, and before 2.12 believes that a capture is
            # under way still, which every later one would trip over.
            torch.cuda.set_stream(stream)
            with suppress(Exception):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            raise

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay


@contextmanager
def watched(device: torch.device, waits: list[str]) -> Iterator[None]:
    """Note in ``waits`` what makes the host wait for a GPU inside, which cannot be recorded.

    To find out by recording it would leave torch in a bad way.
    """
    if device.type != "cuda":
        yield
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        text = str(warning.message)
        if "synchronizing CUDA operation" in text:
            waits.append("it reads a value back from the GPU")
        elif "Synchronization debug mode" not in text:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


class Graphs:
    """Pieces of work that follow each other in the same memory, by name."""

    def __init__(self, device: torch.device) -> None:
        self._replays: dict[Hashable, Callable[[], None]] = {}
        self._seen: set[Hashable] = set()
        self._device = device
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def do(self, name: Hashable, work: Callable[[], None], at_once: bool = False) -> None:
        """Do ``work``: the first time as usual, unless ``at_once``; recorded from then on.

        Raises:
            NoGraphError: it cannot be recorded, and has not been done.
        """
        if name not in self._replays:
            if name not in self._seen and not at_once:
                self._seen.add(name)
                work()
                return
            with _while_recording():
                try:
                    self._replays[name] = record(work, self._pool, self._device)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # of whatever kind a network's operations raise
                    # That a capture failed is said last, and why before.
                    why = error.__context__ or error
                    lines = str(why).splitlines() or [type(why).__name__]
                    raise NoGraphError(lines[0]) from None
        self._replays[name]()


@contextmanager
def _while_recording() -> Iterator[None]:
    global _recording
    _recording = True
    try:
        yield
    finally:
        _recording = False


class Recordings(Generic[_Made]):
    """What was recorded, for each kind of work; the last few are kept, since they hold memory."""

    most = 4

    def __init__(self) -> None:
        # Times done as usual; or what was made; or, in words, why it cannot be: the longest unused
        # first.
        self._known: dict[Hashable, int | _Made | str] = {}

    def find(self, kind: Hashable, make: Callable[[], _Made]) -> _Made | None:
        """What was made for this kind of work; None where that is still to come.

        Raises:
            NoGraphError: it was given up.
        """
        found = self._known.pop(kind, 0)
        if isinstance(found, int):
            found = found + 1 if found < WARM_UP else make()
        self._known[kind] = found
        if len(self._known) > self.most:
            del self._known[next(iter(self._known))]
        if isinstance(found, str):
            raise NoGraphError(found)  # a new one, since errors keep what was under way
        return None if isinstance(found, int) else found

    def give_up(self, kind: Hashable, why: str) -> None:
        """Do this kind of work as usual from now on."""
        self._known[kind] = why


class Fixed:
    """Tensors in the shape and layout of ``values``, kept in place, into which others are copied.

    Raises:
        NoGraphError: several places of a tensor share memory.
    """

    def __init__(self, values: Any) -> None:
        self.values = tree_map_only(Tensor, _standing_still, values)

    def fill(self, values: Any) -> None:
        """Copy other values of the same shapes."""
        for own, new in zip(tree_leaves(self.values), tree_leaves(values), strict=True):
            if isinstance(own, Tensor):
                # What was differentiated with the values before is made anew by the replay.
                with _unsafe_preserve_version_counter(own):
                    own.copy_(new)


def _standing_still(tensor: Tensor) -> Tensor:
    if any(n > 1 and not s for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
        raise NoGraphError("a batch holds an expanded tensor")
    return strided_copy(tensor, tensor.stride())


def kind_of(
    model: nn.Module,
    criterion: Criterion,
    batches: Any,
    kept: Sequence[Tensor],
    settings: Any,
) -> Hashable:
    """What a recording takes for granted, as far as it is cheap to see at every update.

    The network and the loss are known by their identity and by where their tensors are, not by
    what else they hold. ``kept`` are the optimizer's tensors.

    Raises:
        NoGraphError: batches or settings hold something that cannot be compared.
    """
    leaves, form = tree_flatten(batches)
    shapes = [
        (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves
    ]
    own = criterion.buffers() if isinstance(criterion, nn.Module) else ()
    kind = (
        id(model),
        id(criterion),
        tuple(module.training for module in model.modules()),
        tuple((p.data_ptr(), p.requires_grad) for p in model.parameters()),
        tuple(tensor.data_ptr() for tensor in (*model.buffers(), *own, *kept)),
        str(form),
        tuple(shapes),
        tuple(x.data_ptr() if isinstance(x, Tensor) else x for x in tree_leaves(settings)),
    )
    try:
        hash(kind)
    except TypeError as error:
        raise NoGraphError(f"a batch or a setting cannot be compared: {error}") from None
    return kind
