"""From gradients to an update: synchronisation, the global norm, the optimizer, the learning rate."""
