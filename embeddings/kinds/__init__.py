"""The ways to shard a table: one file each, named in `registry`."""
