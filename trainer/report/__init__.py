"""Runs on one page: what their directories say of them, as HTML that needs nothing else.  No torch."""
