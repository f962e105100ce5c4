"""Scores a whole corpus in bounded memory: `python -m trainer_client.score`."""
