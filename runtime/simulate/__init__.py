"""A world for the core: a clock, machines, faults, and checks from outside."""
