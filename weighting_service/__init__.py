"""The weighting service: hosts data weighting models, scores batches and learns from meta-updates."""
