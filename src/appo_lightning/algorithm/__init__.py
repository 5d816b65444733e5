"""The method as pure functions of tensors; torch only."""
