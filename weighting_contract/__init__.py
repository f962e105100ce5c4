"""What service and trainers agree on: weighter specs, errors, tensors on the wire, portable statistics.

Imports neither side. Only `statistics` needs torch, and it is imported by name.
"""
