"""The model card (`README.md`) of what lowbit writes."""

from lowbit.model_card.card import write_card, write_measured

__all__ = ["write_card", "write_measured"]
