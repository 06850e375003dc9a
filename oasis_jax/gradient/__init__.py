"""Methods whose basis follows the gradient, after the fact: for any model."""
