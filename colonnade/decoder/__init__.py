"""The parts of the decoder: attention, feed-forward, norms, the residual stream, and the weights of a step."""
