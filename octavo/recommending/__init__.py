"""Which scheme a model bears: measured, the fewest bits first, until one keeps the limits."""
