"""hgfast beside the other engines for a CPU: see __main__.py."""
