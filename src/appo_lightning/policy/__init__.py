"""The policy: a causal language model that scores and trains."""
