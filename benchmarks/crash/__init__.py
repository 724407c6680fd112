"""A small run that is struck again and again, by every kind of fault."""
