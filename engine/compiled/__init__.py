"""The user's step and the compiled halves of callbacks, as one compiled call."""
