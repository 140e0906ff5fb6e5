"""The embedded default: a small trained model, its text and its zero-shot task, with no network and no account."""
