"""Many schemes and presets on one model: measured in turn, kept, and laid out on a page."""
