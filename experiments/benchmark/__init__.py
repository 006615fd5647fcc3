"""LSTM implementations side by side, on the same work: `python -m experiments.benchmark`.

cases            what is computed: shapes, random images and weights, FLOPs
peers            who computes it; `jax_peers`, `torch_peers` and `onnx_peer` build them
worker           a process that runs one peer and times it
measure          starts the workers, lets them take turns, and collects the timings
report           ratios, tables, a plot
job              whole jobs: start to first step, an epoch, time to an accuracy
torch_reference  the PyTorch side of those
tpu              compiles the layers for a TPU and counts what the compiler scheduled
"""
