"""Many requests as they come: a workload replayed on the engine or on any OpenAI-compatible address."""
