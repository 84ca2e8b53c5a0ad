"""Training: adapters on a frozen low-bit base, and quantization-aware training."""
