"""The processes that read and assemble batches ahead of their use."""
