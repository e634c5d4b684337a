"""Many requests at once on one machine: continuous batching over one shared key/value cache (docs/engine.md)."""
