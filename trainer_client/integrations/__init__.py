"""Weighbridge in trainers that others wrote. Each module needs its framework; `steps` is what they share."""
