"""Making, indexing, verifying and describing of sets of shards."""
