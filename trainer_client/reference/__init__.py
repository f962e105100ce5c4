"""`python -m trainer_client.reference`: trains a small reference model on a pool, for a service to host."""
