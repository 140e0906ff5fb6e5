"""What decides: pruners, updates, budgets, structure."""
