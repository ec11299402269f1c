"""Healing: training a shared model back towards the original it was made from."""
