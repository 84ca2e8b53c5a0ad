"""Kernels for low-bit weights. They know torch and raw tensors, nothing of schemes or models.

`lowbit_kernels.gpu` holds the Triton kernels. Importing anything here compiles nothing and asks no
device anything.
"""
