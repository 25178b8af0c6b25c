"""Executors: whoever can run a Plan. ``reference`` is plain PyTorch and the judge of the others."""
