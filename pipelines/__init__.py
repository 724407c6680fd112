"""From storage to a batch on the device, and the overlap of both with compute."""
