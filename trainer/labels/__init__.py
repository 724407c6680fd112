"""What a ranker predicts of a candidate: one module a kind of label, with its loss, its prediction and its metrics."""
