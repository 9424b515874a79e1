"""What a trajectory does: the model's interface, the steps of a sampler and its updates. Plain data, no torch."""
