"""Which parts of an image change together in its samples: tokens, sums over samples, results and figures."""
