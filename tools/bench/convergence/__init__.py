"""Parts of tools/bench/convergence.py, in reading order: modes, training (a run's own process), runs (the file of
results), comparison, table, picture."""
