"""RNN, GRU and LSTM of several depths, compared: see `__main__`."""
