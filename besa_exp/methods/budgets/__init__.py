"""Budgets: how much each block gives up of a total that is met exactly. Any of them goes with any pruner and update."""
