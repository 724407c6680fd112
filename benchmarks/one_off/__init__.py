"""Questions that were asked once; LOG.md has the answers."""
