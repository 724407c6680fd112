"""Whether machines are fit for a job, and whether its processes still move; what ends a job that does not."""
