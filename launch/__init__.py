"""Jobs: from a recipe's name to processes on one machine or on a cluster, through TorchX.  Imports no torch."""
