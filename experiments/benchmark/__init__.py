"""LSTM implementations side by side, on the same work: `python -m experiments.benchmark`.

cases            what is computed: shapes, random images and weights, FLOPs
peers            who computes it: each implementation as a function to call; `jax_peers` and
                 `torch_peers` build them, `framework` is what they have in common
worker           a process that has one peer and times it when asked
measure          asks the workers in turn, and collects the raw timings
report           ratios, tables, a plot
job              whole jobs: start to first step, an epoch, time to an accuracy
torch_reference  the PyTorch side of those
"""
