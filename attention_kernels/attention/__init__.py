"""Semi-local attention: the public functions, the plan of a problem, the schedule of tiles, kernels by GPU."""
