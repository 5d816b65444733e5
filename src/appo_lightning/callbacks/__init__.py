"""Lightning callbacks, one idea each."""
