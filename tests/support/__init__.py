"""Support code shared by tests: processes, batches, clusters."""
