"""Which layers of a checkpoint break which schemes, and why; what to choose instead."""
