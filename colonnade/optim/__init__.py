"""What turns gradients into an update: synchronisation, the global norm, the optimizer, the learning rate."""
