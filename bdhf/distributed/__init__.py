"""Updates that several ranks of `torch.distributed` make together.

- `bdhf.distributed.placement`: teams of ranks, and which solves which blocks
- `bdhf.distributed.ranks`: what ranks say to each other, counted
- `bdhf.distributed.shares`: mini-batches split over ranks
- `bdhf.distributed.update`: one update of `BlockDiagonalHF`
"""
