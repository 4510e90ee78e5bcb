"""Model families on shared layers: configuration, weights, processors."""
