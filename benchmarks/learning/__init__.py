"""Methods x modes x corpora x seeds, at equal steps and at equal compute: whether learned weights pay for themselves.

    python -m benchmarks.learning [--quick] [--check] [--texts DIR] [--out runs/learning]

`plan.py` says what is run, `execute.py` runs it, `results.py` keeps it in one file, `figures.py` makes numbers of it,
`goals.py` holds them against the goals, `report.py` and `plots.py` show them.
"""
