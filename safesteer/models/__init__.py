"""Models: load, batch, run forward, generate and measure a chat model, plain or bridged."""
