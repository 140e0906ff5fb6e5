"""Updates: what the kept weights do about the pruned ones, after any pruner."""
