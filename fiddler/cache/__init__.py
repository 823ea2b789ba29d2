"""Which experts hold the GPU's slots: routing history, policies, slots and their replay. No tensor is touched."""
