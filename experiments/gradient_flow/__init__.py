"""The textbook's claims about vanishing gradients, measured: see `__main__`."""
