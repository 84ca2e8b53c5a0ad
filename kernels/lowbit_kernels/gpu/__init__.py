"""Triton kernels for GPUs. Import the submodules; triton itself is needed by all of them."""
