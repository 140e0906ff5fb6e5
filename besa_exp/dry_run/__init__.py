"""`dry_run=true`: what a run would need of memory, disk and time, shown before any weight is read."""
