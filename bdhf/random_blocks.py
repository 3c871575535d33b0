"""A network whose parameters lie in blocks drawn at random, scalar by scalar (for claim H1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class RandomBlocks(nn.Module):
    """``network`` with its trainable parameters gathered from vectors, the blocks.

    Outputs and starting point are the network's own; only which scalars share a block of the
    Gauss-Newton matrix changes. The paper's blocks are layers; these take from every layer alike:
    with sizes of layers they keep as many entries of the matrix, but none of its structure.

    Args:
        network: the network; its parameters become constants of no account.
        sizes: how many scalars each block has.
        seed: of the draw. The same for all runs, so that seeds differ in what they always do.

    Raises:
        ValueError: the sizes do not add up to the network's parameters, two modules share one, one
            is frozen, or the network has buffers.
    """

    order: Tensor

    def __init__(self, network: nn.Module, sizes: Sequence[int], seed: int = 0) -> None:
        super().__init__()
        named = dict(network.named_parameters(remove_duplicate=False))
        if len(named) != len(set(named.values())):
            raise ValueError("random blocks: modules of this network share parameters")
        if not all(parameter.requires_grad for parameter in named.values()):
            raise ValueError("random blocks: this network has frozen parameters, which would move")
        if any(True for _ in network.buffers()):
            raise ValueError("random blocks: this network has buffers, which nothing would move")
        flat = torch.cat([p.detach().reshape(-1) for p in named.values()])
        if min(sizes, default=0) < 1 or sum(sizes) != len(flat):
            raise ValueError(
                f"sizes={list(sizes)}; each must be 1 or more, and all add up to {len(flat)}, the "
                "network's parameters"
            )
        drawn = torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed))
        # In the order of memory inside a block, which makes no difference but to the cache.
        chosen = [block.sort().values for block in drawn.split(list(sizes))]
        self.blocks = nn.ParameterList(nn.Parameter(flat[places].clone()) for places in chosen)
        # No part of the state: the draw gives it again.
        self.register_buffer("order", torch.cat(chosen), persistent=False)
        self._shapes = {name: parameter.shape for name, parameter in named.items()}
        self._sizes = [parameter.numel() for parameter in named.values()]
        # In a list, so that its parameters are not this module's.
        self._network = [network.requires_grad_(False)]

    def train(self, mode: bool = True) -> RandomBlocks:
        """Set the mode, of the network too."""
        self._network[0].train(mode)
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's outputs."""
        values = torch.cat(list(self.blocks))
        # Scattered and not gathered, since the transpose of this, a gather, is far cheaper than
        # that of a gather, a sum over places that torch cannot know to be distinct.
        scalars = torch.zeros_like(values).scatter(0, self.order, values).split(self._sizes)
        pairs = zip(self._shapes.items(), scalars, strict=True)
        parameters = {name: part.view(shape) for (name, shape), part in pairs}
        return functional_call(self._network[0], parameters, args, kwargs)
