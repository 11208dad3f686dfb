"""A timm model, and what it says about images."""
