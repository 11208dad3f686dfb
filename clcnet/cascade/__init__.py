"""Which answer stands, what that costs, and its run over images."""
