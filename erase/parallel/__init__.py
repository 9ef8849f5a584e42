"""Several processes: who does what, what they exchange, and training in shards."""
