"""Translation between an engine's connector interface and the service. One module per engine."""
