"""Formats that a plan can be exported as, one per module; ``optimizer.registries.EXPORT_FORMATS`` lists them."""
