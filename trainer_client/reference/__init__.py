"""`python -m trainer_client.reference`: makes a reference of a pool, counted or trained, for a service to host."""
