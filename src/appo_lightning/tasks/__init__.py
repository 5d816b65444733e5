"""Where questions come from: the embedded world and dataset readers."""
