"""`python -m trainer_client.run`: pretrains a small causal LM with learned data weights, and teaches the weighter."""
