"""What an update takes on many devices: predicted, and checked by processes of one machine.

- `bdhf.scaling.model`: the formulas, pure functions
- `bdhf.scaling.parts`: the parts of an update, and whole updates, to be timed
- `bdhf.scaling.turns`: things timed in turn by one job of processes
"""
