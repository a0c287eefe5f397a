"""Every operator and the whole training and decoding step, beside the peers that are installed.

`pytest bench/` (README, "Measure") and, on a machine with a GPU and without a network, `python bench/gpu.py`.
"""
