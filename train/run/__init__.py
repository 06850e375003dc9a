"""One training run: built, trained, watched, kept; and what is told of it before."""
