"""Bit allocation: which scheme each layer gets, so that a whole model meets a budget."""
