"""References: small frozen language models, trained or counted, that turn token ids into what weighters read.

`load_reference` verifies a folder and gives a `Reference`; one engine thread uses it. Must not know weighters, jobs or
transports.
"""

from weighting_service.reference.folder import load_reference, reference_files, write_reference
from weighting_service.reference.model import Reference
from weighting_service.reference.packing import PackReport

__all__ = ["PackReport", "Reference", "load_reference", "reference_files", "write_reference"]
