"""Tables: declaration, placement on ranks and sparse optimisation.  Knows TorchRec and nothing of ours."""
