"""What all experiments share: flags, signals, exit status, tables, figures, short trainings.

Nothing here depends on one experiment, or on the training run in `experiments.training_run`.
"""
