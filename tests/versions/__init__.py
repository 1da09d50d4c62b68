"""The contract with transformers and torch, on other versions than the pinned ones."""
