"""Named experiments: grids of ordinary runs, stored cell by cell, beside what the papers report.

definition.py   what an experiment is, read from its YAML file in this folder
cells.py        finished cells on disk
runner.py       does the cells that are missing
comparison.py   two cells on the same users; the papers' claims, decided
paper.py        the papers' tables, as data (paper.yaml)
report.py       all of it as Markdown and as one page
"""
