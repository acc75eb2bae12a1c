"""Batches: where they come from, and how a run reads them."""
