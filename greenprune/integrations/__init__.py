"""Thin callbacks that drive a :class:`greenprune.Pruner` inside other libraries' training loops; optional extras."""
