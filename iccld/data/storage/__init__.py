"""Storage: where shards lie, how their bytes are reached, and the index that finds a sample among them."""
