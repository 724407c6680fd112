"""Tables: declaration, placement on ranks and sparse optimisation.  Knows TorchRec, knows nothing of the other packages."""
