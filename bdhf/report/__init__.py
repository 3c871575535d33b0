"""From finished run folders to curves, figures, verdicts and the page. Nothing here trains.

table.py       run folders to one compact table of curves per scale; all that follows reads it alone
quantities.py  what is read off a curve
evidence.py    the cells of a scale, and what was measured
claims/        the paper's claims, each a small function with its definition
verdicts.py    the rule by which a claim gets its verdict
blocks.py      the cells of the study of blocks
figures.py     the paper's figures and ours
charts.py, interactive.py, assets/   the page's charts
tuning.py      what the tuning study says
page.py        the report, as Markdown and as a page
readme.py      the results in the README
"""
