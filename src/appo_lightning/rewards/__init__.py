"""What a response earns."""
