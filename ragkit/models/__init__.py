"""Model names to folders, weights and tokenizers."""
