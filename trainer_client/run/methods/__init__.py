"""What Weighbridge is compared with: other ways to say which samples are useful, behind one interface.

A judge (`judges.py`) gives samples logits; what is done with them, choosing a batch or weighing one (`judged.py`), does
not depend on the judge. `prepare.py` makes them for a run. None of it needs a service, and none sees a test document.
"""
