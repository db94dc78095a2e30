"""Experiments: the paper's tables and figures, baselines, sweeps and reports. `python -m experiments.table1 --help`"""
