"""From scores to masks of an exact sparsity, and each layer's share of a budget."""
