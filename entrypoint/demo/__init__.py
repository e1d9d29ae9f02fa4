"""The demo: a small real model, traces sampled from it, and both methods run on them."""
