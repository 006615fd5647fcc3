"""Which ideas read more digits than the recipe does."""
