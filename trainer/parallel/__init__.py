"""Everything that knows of several ranks: the mesh, and how a single-process model is spread over it."""
