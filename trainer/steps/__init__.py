"""What one training step is made of: its batch, its kernels, its update, what it says of itself."""
