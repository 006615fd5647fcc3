"""What stands around every experiment: flags, signals, exit status, tables, figures, short runs.

Nothing here knows an experiment, or the training run in `experiments.training_run`.
"""
