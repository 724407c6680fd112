"""What a model's predictions are worth: metrics, the baselines beside them, and how all ranks compute both."""
