"""One training run and its workdir: flags, loop, checkpoints, files, and the run restored.

`experiments.mnist_lstm` composes these; what looks at a finished run imports `restored`.
"""
