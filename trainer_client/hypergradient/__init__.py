"""The cotangent of a batch: how the validation loss after the next optimiser step depends on each sample's weight.

    theta' = theta - eta P grad L(theta),  L = (1/B) sum_i w_i l_i
    c_i    = dL_val(theta')/dw_i = -(eta/B) <P grad L_val, grad l_i>      (Yu et al. 2025, arXiv 2507.16178)

Needs torch and a model, knows no service. A call leaves the model as it found it, bit for bit, also when it raises.
"""

from trainer_client.hypergradient.errors import DegenerateCotangent
from trainer_client.hypergradient.estimate import METHODS, Method, cotangent
from trainer_client.hypergradient.step import Preconditioner

__all__ = ["METHODS", "DegenerateCotangent", "Method", "Preconditioner", "cotangent"]
