"""A trained run as one file that other programs run: see `__main__`.

writing  makes the bytes of each format from a run
reading  checks such a file and computes with it, without Flax for StableHLO and ONNX
card     the page beside the file
"""
