"""`dry_run=true`: what a run would need of memory, disk and time, told before any weight is read."""
