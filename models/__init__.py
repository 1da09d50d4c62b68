"""Only what differs between architectures: a folder each."""
