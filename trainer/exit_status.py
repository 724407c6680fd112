"""Exit statuses of our commands besides 0, done.  No imports: said where packages are missing, too."""

FAILED, WRONG_USE, STOPPED = 1, 2, 3
"""STOPPED: in good order, the same command resumes."""
