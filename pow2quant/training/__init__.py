"""Training of quantized networks: learned exponents, and a loop that survives being killed.

It acts on any backend's simulation through `Simulation.intercept`, and what it learns ends in `Simulation.load`.
"""
