"""Several processes: their shares of the work, their exchanges, and training in shards."""
