"""One training run and its workdir: flags, loop, checkpoints, files, and restoring the result.

`experiments.mnist_lstm` composes these. Code that examines a finished run imports `restored`.
"""
