"""Tools that the policy may call."""
