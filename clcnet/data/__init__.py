"""Where images come from, and what a model said about them."""
