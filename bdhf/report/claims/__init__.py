"""The claims, each a small function with its definition beside it.

A function decorated with `bdhf.report.verdicts.claim` in any file of this folder is judged and
shown on the page.
"""
