"""A campaign of damage: thousands of seeded tries to make Octavo load, convert or compute what is wrong.

    python -m tests.campaign --tries 10000 --seed 0     (or: make campaign TRIES=10000)
    python -m tests.campaign --seed 0 --only 4711       one try again, alone, with its traceback

A try follows from the seed and its number alone. Its end is one of `outcomes.py`; the rest of the package:

    kinds/        what is damaged and how, a file per kind
    bases.py      the tiny checkpoints, outputs and files that are damaged
    json_damage.py, tensor_damage.py    damage that kinds share
    trial.py      one try: prepared, run, judged
    pool.py       forked workers, with limits of time and memory
    report.py     the table, and a line for each failure
"""
