"""Does influence predict? Retrainings, and the statistics that judge scores and rules by them."""
