"""What another distribution can add to qcgraph: a pass, a model, a target and a forecaster."""
