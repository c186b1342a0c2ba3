"""Measurements beside the peers that users come from; each side runs in a process of its own."""
