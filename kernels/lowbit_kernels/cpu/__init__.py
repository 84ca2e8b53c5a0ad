"""Native kernels for CPUs: C++ sources, and what builds and calls them."""
