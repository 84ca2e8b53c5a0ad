"""Hugging Face: the config, the quantizer plug-in and its lazy registration."""
