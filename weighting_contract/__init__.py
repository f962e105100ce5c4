"""What service and trainers agree on: weighter specs, errors, tensors on the wire, portable statistics.

Imports neither side. `statistics` and `ngrams` need torch, and are imported by name.
"""
