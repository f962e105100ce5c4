"""The client's spans: one an attempt to make a call. What the trainer has around it is their parent."""

from weighting_contract.tracing import Tracer

TRACER = Tracer("weighbridge-client")
