"""Makes, indexes, verifies and describes sets of shards."""
