"""What needs a real Slurm: run in one process, since there is one cluster at a time."""
