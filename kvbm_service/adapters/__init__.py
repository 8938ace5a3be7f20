"""What touches the world: one small Protocol per port, one library per adapter."""
