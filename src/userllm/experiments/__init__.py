"""Named experiments: grids of ordinary runs, stored cell by cell, beside what the papers report.

definition.py   what an experiment is, read from its YAML file in this folder
cells.py        finished cells on disk
runner.py       does the cells that are missing
comparison.py   two cells on the same users; the papers' claims, decided
paper.py        the papers' tables, as data (paper.yaml)
stored.py       an experiment with its finished cells
tables.py, figures.py, efficiency.py   what a report shows
report.py       one experiment, or all of them, as Markdown and as one page (page.py)
"""
