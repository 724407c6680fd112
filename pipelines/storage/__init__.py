"""Data sets on a disk or in an object store: their files, columns and ids, as flat arrays."""
