"""One thread per test process: the models are tiny, and pytest runs a process per core.

Two threads that wait for each other on a busy core are many times slower than one.

Without a GPU, Triton kernels run in Triton's interpreter, on CPU tensors. Triton reads the variable
when a kernel is defined, so it is set before anything is imported.
"""

from __future__ import annotations

import os

# Also for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)
