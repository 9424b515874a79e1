"""The description of a trajectory: the model's interface, the steps of a sampler, its updates. Plain data, no torch."""
